"""Text that settings are chosen on: never what tables are judged on, nor what a method has seen."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.data.recipe import Recipe
from qexp.eval.base import Evaluator
from qexp.step import Step
from qexp.sweeps.callbacks import errors_exit

# by the corpus that tables are judged on; its neighbour is text that no table is made of
INSTEAD = {
    "wikitext2": "eval=wikitext2_choose_512x16 with calibration.split=calibrate",
    "wikitext2_tokens": "eval=wikitext2_tokens_choose_512x16",
}
OTHER = "eval=c4_train_512x16"


class Choosing(Callback):
    """Ends a search, before its first job, that would choose on what tables are judged on."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with errors_exit():
            check(config)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with errors_exit():
            check(config)


def check(config: DictConfig) -> None:
    """UserError for a protocol that judges, or whose text calibrates or trains."""
    steps: list[Step] = [instantiate(config.transform), instantiate(config.method)]
    recipes: dict[str, Recipe] = {"calibration": instantiate(config.calibration)}
    for step in steps:
        recipes |= step.recipes()
    for key, node in config.eval.items():
        if node.get("_target_") is None:  # not chosen: reported when a job builds it
            continue
        evaluator: Evaluator = instantiate(node)
        if judged := evaluator.judged():
            corpora = [corpus.name for corpus, _ in evaluator.reads()]
            instead = INSTEAD.get(corpora[0], OTHER) if corpora else OTHER
            raise UserError(
                f"search: eval.{key} reads {judged}, which tables are judged on; choose on other "
                f"text: {instead}, or another split of the corpus (eval.{key}.split=…)"
            )
        for name, recipe in recipes.items():
            for corpus, split in evaluator.reads():
                if any(corpus.overlaps(split, *other) for other in recipe.reads()):
                    raise UserError(
                        f"search: eval.{key} reads the {split} split of {corpus.name}, and so does "
                        f"{name}; what is chosen there would be chosen on text that was seen: "
                        f"{INSTEAD.get(corpus.name, 'eval=wikitext2_choose_512x16')}"
                    )
