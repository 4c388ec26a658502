"""Benchmarks of the stages of a job, as ratios within one process."""

from collections.abc import Callable, Sequence

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qexp.commands.bench.evaluation import evaluation
from qexp.commands.bench.memory import memory
from qexp.commands.bench.methods import methods
from qexp.commands.bench.overhead import overhead
from qexp.commands.bench.page import page
from qexp.commands.bench.penalty import penalty
from qexp.commands.bench.ranges import ranges
from qexp.commands.bench.scaling import scaling
from qexp.commands.bench.sharing import sharing
from qexp.commands.bench.solving import blockwise, oac, online, transform
from qexp.commands.bench.training import qat, quadapter
from qexp.commands.bench.zeroshot import zeroshot
from qexp.common.errors import UserError
from qexp.config.location import conf
from qexp.runs import resolvers


def main(arguments: Sequence[str]) -> None:
    """`qexp bench NAME [key=value …]`: the configuration of a run, measured instead of kept."""
    name = arguments[0] if arguments else ""
    if name not in BENCHES:
        raise UserError(f"bench: {name or 'no name'} is unknown: give one of {', '.join(BENCHES)}")
    overrides = list(arguments[1:])
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        cfg = compose("config", overrides)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    print(f"{name}: {' '.join(overrides)}, {torch.get_num_threads()} threads")
    if name in OF_COMMANDS:
        OF_COMMANDS[name](cfg, overrides)
    else:
        OF_STAGES[name](cfg)


# Of the stages of a job in this process; of whole commands, which are given the overrides.
OF_STAGES: dict[str, Callable[[DictConfig], None]] = {
    "blockwise": blockwise,
    "evaluation": evaluation,
    "qat": qat,
    "quadapter": quadapter,
    "penalty": penalty,
    "oac": oac,
    "online": online,
    "ranges": ranges,
    "transform": transform,
    "zeroshot": zeroshot,
}
OF_COMMANDS: dict[str, Callable[[DictConfig, list[str]], None]] = {
    "memory": memory,
    "methods": methods,
    "overhead": overhead,
    "page": page,
    "scaling": scaling,
    "sharing": sharing,
}
BENCHES = (*OF_STAGES, *OF_COMMANDS)
