"""Benchmark of quantization methods against each other on one block."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qexp.commands.bench.timing import empty_cache, loaded, show, spent
from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.config.location import conf
from qexp.step import Step


def methods(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Times of several methods on the model's first block, relative to the first of them.

    `+methods=[gptq,lnq]` names them; a method with settings of its own is a text of overrides in
    quotes, such as `"gptq method/residual=low_rank"`. Each starts from the loaded model with an
    empty cache.
    """
    if not cfg.get("methods"):
        raise UserError("methods: there are none; give them, for example +methods=[gptq,lnq]")
    shared = [each for each in overrides if not each.startswith("+methods=")]
    task, batches = loaded(cfg)
    del task.blocks[1:]
    stages = {}
    for words in cfg.methods:
        name, *own = words.split()
        with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
            chosen = compose("config", [*shared, f"method={name}", *own])
        empty_cache()
        step: Step = instantiate(chosen.method)
        stages[words] = spent(task, partial(step, deepcopy(task), batches.copy))
    show(stages, next(iter(stages)))
