"""Loading of lm-evaluation-harness tasks with rows from local files; prompts are not changed.

This module imports the harness; import it only where the harness is used.
"""

import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from qexp.common import progress
from qexp.common.errors import UserError, first_line
from qexp.common.files import data_folder
from qexp.eval.harness import index, local_rows

# The defaults of the harness's command, so that few-shot examples are the same.
SEED, NUMPY_SEED, TORCH_SEED, SHOT_SEED = 0, 1234, 1234, 1234

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs a page of warnings per task


class Splits(dict[str, datasets.Dataset]):
    """Local splits; a split without a file is empty, as the harness accesses unused splits too."""

    def __missing__(self, split: str) -> datasets.Dataset:
        return next(iter(self.values())).select([])


@contextmanager
def faults(task: object, field: str) -> Iterator[None]:
    """UserError that names the task and the field for whatever is raised inside: the harness lets
    the exceptions of jinja, of datasets and of a task's own functions through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind, said = type(error).__name__, first_line(error)
        reason = kind if said in ("", kind) else f"{kind}: {said}"
        raise UserError(f"eval task {task}: {field} ({reason})") from error


class LocalTask(ConfigurableTask):
    """A task whose rows come from local files where they are, else from the hub.

    What the harness renders from a row names its field where it fails.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        ours = ("class", "qexp_source", "qexp_folder")
        self.source: str = config["qexp_source"]
        self.folder = data_folder(config["qexp_folder"])
        self.files: list[Path] = []
        with faults(config.get("task"), "its fields make no task"):
            ConfigurableTask.__init__(
                self, config={k: v for k, v in config.items() if k not in ours}
            )
        if self.DATASET_PATH == "json":
            self._check_target()

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        path, name = self.DATASET_PATH, self.DATASET_NAME
        given = (dataset_kwargs or {}).get("data_files")
        if path == "json" and given is not None:
            self.dataset = self._user_files(given)
            return
        facts = local_rows.find(path, name)
        if facts is not None and self.source != "hub" and self.folder is not None:
            paths = dict(local_rows.local(facts, name, self.folder))
            if paths and (self._evaluated(facts) in paths):
                self.files = list(paths.values())
                self.dataset = Splits(
                    (split, datasets.Dataset.from_list(local_rows.rows(facts, name, file)))
                    for split, file in paths.items()
                )
                return
        if self.source == "local":
            raise UserError(self._missing(facts, "eval.source=local needs the file"))
        try:
            ConfigurableTask.download(self, dataset_kwargs)
        except Exception as error:  # no network, no such data set, a changed layout, …
            reason = str(error).partition("\n")[0]
            why = f"loading {path} from the hub failed ({type(error).__name__}: {reason})"
            raise UserError(self._missing(facts, why)) from error

    @cached_property
    def eval_docs(self) -> datasets.Dataset:
        """The evaluated rows, cached: the harness would process all rows at every access."""
        return ConfigurableTask.eval_docs.fget(self)

    def build_all_requests(self, **settings: Any) -> None:
        """Hides the harness's progress bar, which has no switch."""
        with redirect_stderr(io.StringIO()):
            ConfigurableTask.build_all_requests(self, **settings)

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        with self._rendering("doc_to_text", doc_to_text):
            return ConfigurableTask.doc_to_text(self, doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        with self._rendering("doc_to_target", doc_to_target):
            return ConfigurableTask.doc_to_target(self, doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        with self._rendering("doc_to_choice", doc_to_choice):
            return ConfigurableTask.doc_to_choice(self, doc, doc_to_choice)

    def doc_to_prefix(self, doc: Any) -> Any:
        with self._rendering("gen_prefix", None):
            return ConfigurableTask.doc_to_prefix(self, doc)

    def fewshot_context(self, doc: Any, num_fewshot: int, **settings: Any) -> Any:
        with faults(self.config.task, f"num_fewshot {num_fewshot}: no prompt can be made"):
            return ConfigurableTask.fewshot_context(self, doc, num_fewshot, **settings)

    def _rendering(self, field: str, given: Any) -> AbstractContextManager[None]:
        """For `field`; `given` is what the examples' own settings have in its place."""
        own = getattr(self.config, field)
        place = field if given is None or given == own else f"fewshot_config.{field}"
        template = own if given is None else given
        said = f"{template!r} " if isinstance(template, str) else ""
        said = "null " if template is None else said
        columns = ", ".join(self.features)
        return faults(self.config.task, f"{place}: {said}cannot be rendered for a row of {columns}")

    def _check_target(self) -> None:
        """UserError if the right answer to the first row is none of its choices: the harness would
        count every answer as wrong."""
        row = self.task_docs[0]
        theirs = callable(self.config.process_results)
        if self.OUTPUT_TYPE != "multiple_choice" or self.multiple_input or theirs:
            return
        choices, target = self.doc_to_choice(row), self.doc_to_target(row)
        numbers = range(len(choices))
        if isinstance(target, list):
            right = all(each in numbers for each in target)
        else:
            right = target in (choices if isinstance(target, str) else numbers)
        if not right:
            raise UserError(
                f"eval task {self.config.task}: doc_to_target: {self.config.doc_to_target!r} gives "
                f"{target!r} for the first row, which is none of its choices {choices!r} nor the "
                f"number of one (0 to {len(choices) - 1})"
            )

    def check_shots(self, shots: int) -> None:
        """Raises UserError if the split of the few-shot examples has no file."""
        split = self.fewshot_cfg.split or self.config.training_split or self.config.validation_split
        if shots and isinstance(self.dataset, Splits) and split not in self.dataset:
            facts = local_rows.find(self.DATASET_PATH, self.DATASET_NAME)
            why = f"{shots} examples come from the {split} rows"
            raise UserError(self._missing(facts, why, split))

    def _evaluated(self, facts: local_rows.Facts) -> str:
        return self.config.test_split or self.config.validation_split or next(iter(facts.files))

    def _missing(self, facts: local_rows.Facts | None, why: str, split: str | None = None) -> str:
        """The error message, with the file where `split` (None: the evaluated one) is expected."""
        advice = "only the hub has its rows"
        if facts is not None:
            path = facts.files.get(split or self._evaluated(facts), "").format(self.DATASET_NAME)
            advice = f"put them at {self.folder or '$QEXP_DATA_DIR'}/{path}" if path else advice
        return f"eval task {self.config.task}: no local rows: {why}; {advice}"

    def _user_files(self, given: Any) -> Splits:
        """The user's files by split; a single file is the evaluated split."""
        split = self.config.test_split or self.config.validation_split or "validation"
        by_split = dict(given) if isinstance(given, Mapping) else {split: given}
        made = {}
        for key, names in by_split.items():
            paths = [Path(name) for name in ([names] if isinstance(names, str) else names)]
            for path in paths:
                if not path.is_file():
                    raise UserError(
                        f"eval task {self.config.task}: dataset_kwargs.data_files: {path} is not a "
                        f"file; put the {key} rows there as jsonl"
                    )
            self.files += paths
            rows = [row for path in paths for row in local_rows.read_records(path)]
            made[key] = datasets.Dataset.from_list(rows)
        if not made.get(split):
            raise UserError(
                f"eval task {self.config.task}: dataset_kwargs.data_files has no rows of "
                f"{split}, the split that is evaluated"
            )
        return Splits(made)


@cache
def manager() -> TaskManager:
    """The harness's manager of its tasks, with their index from the cache."""
    made = TaskManager(include_defaults=False)
    made.task_index.update(index.entries())
    return made


def load(
    specs: Sequence[str | dict[str, Any]], source: str, folder: str | None, shots: int | None
) -> dict[str, Any]:
    """Tasks and groups by name, ready for evaluation, as the harness's own command creates them.

    A spec is a name of the harness (task, group or tag), or a new task: the fields of a harness
    task yaml, with `dataset_path: json` and `dataset_kwargs.data_files`.

    Raises UserError for an unknown name, and for data that is neither local nor on the hub.
    """
    ours = {"class": LocalTask, "qexp_source": source, "qexp_folder": folder}
    known = manager().task_index
    for spec in specs:
        if not isinstance(spec, Mapping) and spec not in known:
            raise UserError(
                f"eval task {spec}: the harness has no such task, group or tag; "
                "`lm-eval ls tasks` lists them"
            )
    if not progress.drawn():
        datasets.disable_progress_bars()
    with isolate_rng():  # some tasks shuffle their choices
        random.seed(SEED)
        np.random.seed(NUMPY_SEED)
        torch.manual_seed(TORCH_SEED)
        wanted: list[Any] = []
        for spec in specs:
            if isinstance(spec, Mapping):
                wanted.append({**spec, **ours})
                continue
            # with overrides, the manager's own load() passes a group's list of tasks to its members
            # as their name
            built = TaskFactory().build(known[spec], overrides=ours, registry=known)
            wanted += built if isinstance(built, list) else [built]
        loaded = manager().load(wanted)
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        count = (default or 0) if shots is None or default == 0 else shots
        task.set_config(key="num_fewshot", value=count)
        if isinstance(task, LocalTask):
            task.check_shots(count)
    return loaded
