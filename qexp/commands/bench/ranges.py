"""Benchmark of range searches: the scales of the linears of one block."""

from omegaconf import DictConfig

from qexp.commands.bench.timing import loaded, show, spent
from qexp.config.instantiate import instantiate
from qexp.grid import Grid, least_error


def ranges(cfg: DictConfig) -> None:
    """The search of `weight`, and the same one without its division into parts."""
    task, _ = loaded(cfg)
    grid: Grid = instantiate(cfg.weight)
    names = [name for group in task.arch.groups for name in group.linears]
    weights = [task.blocks[0].get_parameter(f"{name}.weight").detach() for name in names]

    def fit() -> None:
        for weight in weights:
            grid.scales_of(weight)

    stages, part = {"in parts": spent(task, fit)}, least_error.PART
    least_error.PART = 2**62
    try:
        stages["whole layers"] = spent(task, fit)
    finally:
        least_error.PART = part
    show(stages, "in parts")
