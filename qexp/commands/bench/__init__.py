"""What a job costs, stage by stage, as ratios within one run."""

import sys
from collections.abc import Callable, Sequence

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qexp.commands.bench.evaluation import evaluation
from qexp.commands.bench.overhead import overhead
from qexp.commands.bench.penalty import penalty
from qexp.commands.bench.sharing import sharing
from qexp.commands.bench.solving import blockwise, oac
from qexp.commands.bench.training import qat, quadapter
from qexp.commands.bench.zeroshot import zeroshot
from qexp.config.location import conf
from qexp.runs import resolvers
from qexp.sweeps.failures import run_reporting_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """`bench.py NAME [key=value …]`: the configuration of a run, measured instead of kept."""
    name, *overrides = sys.argv[1:] if arguments is None else arguments
    if name not in BENCHES:
        raise SystemExit(f"bench.py: {name} is unknown: give one of {', '.join(BENCHES)}")
    if code := run_reporting_errors(lambda: _measure(name, overrides)):
        raise SystemExit(code)


def _measure(name: str, overrides: Sequence[str]) -> None:
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        cfg = compose("config", list(overrides))
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    print(f"{name}: {' '.join(overrides)}, {torch.get_num_threads()} threads")
    BENCHES[name](cfg)


BENCHES: dict[str, Callable[[DictConfig], None]] = {
    "blockwise": blockwise,
    "evaluation": evaluation,
    "qat": qat,
    "quadapter": quadapter,
    "penalty": penalty,
    "oac": oac,
    "overhead": overhead,
    "sharing": sharing,
    "zeroshot": zeroshot,
}
