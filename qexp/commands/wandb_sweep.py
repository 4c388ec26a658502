"""Command `qexp wandb-sweep`: conversion of a search to a W&B sweep."""

import sys
from collections.abc import Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import ListConfig, OmegaConf

from qexp.common.errors import UserError
from qexp.config.location import conf
from qexp.sweeps import choosing


def wandb_sweep(overrides: Sequence[str]) -> str:
    """A W&B sweep as yaml, with the search's parameters, number of trials and first objective."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    if not (params := OmegaConf.select(cfg, "hydra.sweeper.params")):
        raise UserError("wandb-sweep: nothing is searched; give a search, search=gptq_damping")
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    choosing.check(cfg)
    trials = OmegaConf.select(cfg, "hydra.sweeper.n_trials")
    wanted = cfg.optimize[0] if isinstance(cfg.optimize, ListConfig) else cfg.optimize or "ppl"
    name = wanted if "/" in wanted else f"{next(iter(cfg.eval.values())).name}/{wanted}"
    # each job of the W&B agent is a single run, although the search is a multirun
    single = ["hydra.mode=RUN", "logger=wandb", "${args_no_hyphens}"]
    content = {
        "method": "bayes" if trials else "grid",
        "metric": {"name": name, "goal": "minimize"},
        **({"run_cap": trials} if trials else {}),
        "parameters": {each.get_key_element(): _distribution(each) for each in parsed},
        "command": ["${env}", "WANDB_MODE=online", "qexp", *overrides, *single],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _distribution(override: Override) -> dict[str, Any]:
    """One parameter in the format of W&B sweeps."""
    value = override.value()
    if not override.is_sweep_override():
        return {"value": value}
    if not isinstance(value, IntervalSweep):
        return {"values": list(override.sweep_iterator())}
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    kinds = {(True, False): "int_uniform", (True, True): "q_log_uniform_values"}
    kinds |= {(False, False): "uniform", (False, True): "log_uniform_values"}
    kind = kinds[whole, "log" in value.tags]
    return {"distribution": kind, "min": value.start, "max": value.end}


def main(arguments: Sequence[str]) -> None:
    """`qexp wandb-sweep search=NAME [key=value …] > sweep.yaml`."""
    sys.stdout.write(wandb_sweep(arguments))
