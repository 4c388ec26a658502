"""The keys at the root of a configuration."""

from typing import Any

from omegaconf import DictConfig, ListConfig

from qexp.common import numerics
from qexp.common.errors import UserError, check_bool, check_int, check_number, check_range

SWITCHES = ("offload", "replay", "progress", "save_weights", "dry_run", "fail_fast")
RETRIES = (None, "failed")


def check(cfg: DictConfig) -> None:
    """UserError for a value that its key cannot have."""
    check_bool("", cfg, *SWITCHES)
    check_range("", cfg, "a whole number from 0 to 2**32 - 1", _seed, "seed")
    if cfg.threads is not None:
        check_int("", cfg, threads=1)
    if cfg.get("memory") is not None:
        check_number("", cfg, memory=0)
    if not isinstance(cfg.device, str):
        raise UserError(f"device={cfg.device}: give cpu, cuda, cuda:N or auto.")
    numerics.of(cfg)
    if not isinstance(cfg.run, str | None):
        raise UserError(f"run={cfg.run}: give the folder of a finished run, run=outputs/…, or null")
    for key in ("label", "kind"):
        if not isinstance(cfg[key], str | int | float | None):
            raise UserError(f"{key}={cfg[key]}: give a word or null")
    wanted = cfg.optimize if isinstance(cfg.optimize, ListConfig) else [cfg.optimize or "ppl"]
    if not all(isinstance(name, str) for name in wanted):
        raise UserError(f"optimize={cfg.optimize}: give the name of a metric, or a list of names")
    if not isinstance(cfg.records, str | None):
        raise UserError(f"records={cfg.records}: give the folder of records, or null for none")
    if cfg.retry not in RETRIES:
        raise UserError(f"retry={cfg.retry}: give failed, or null for no second try")


def _seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32
