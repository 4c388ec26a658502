"""Benchmark of range searches: the scales of the linears of one block."""

from omegaconf import DictConfig

from qexp.commands.bench.timing import loaded, show, spent
from qexp.config.instantiate import instantiate
from qexp.grid import Grid, least_error


def ranges(cfg: DictConfig) -> None:
    """The search of `weight`, and the same one with each trial of a whole layer in one piece."""
    task, _ = loaded(cfg)
    grid: Grid = instantiate(cfg.weight)
    names = [name for group in task.arch.groups for name in group.linears]
    weights = [task.blocks[0].get_parameter(f"{name}.weight").detach() for name in names]

    def fit(whole: bool) -> None:
        for weight in weights:
            least_error.PART = weight.numel() if whole else part
            grid.scales_of(weight)

    part = least_error.PART
    try:
        stages = {
            "in parts": spent(task, lambda: fit(whole=False)),
            "whole layers": spent(task, lambda: fit(whole=True)),
        }
    finally:
        least_error.PART = part
    show(stages, "in parts")
