"""Activation ranges before and after a run: per channel at one site, errors at all sites."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.models.device import as_task
from qexp.models.from_run import FromRun
from qexp.quantizers.scheme import quantize_activations
from qexp.report.figure import Picture, figure
from qexp.report.plots import COLOURS
from qexp.runs import results
from qexp.task import Batch, Task, singly

SIDES = ("float model", "as quantized")


@dataclass
class Seen:
    """Input ranges per channel and the quantization error of one quantizer."""

    low: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    high: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))
    noise: float = 0.0
    power: float = 0.0

    def add(self, x: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]) -> None:
        rows = x.detach().flatten(0, -2).float().cpu()
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        change = (rounded - x).detach().double()
        self.noise += float(change.square().sum())
        self.power += float(x.detach().double().square().sum())

    @property
    def error(self) -> float:
        """The squared quantization error relative to the tensor's squared norm."""
        return self.noise / max(self.power, torch.finfo(torch.float64).tiny)


@torch.no_grad()
def watch(task: Task, batches: Sequence[Batch]) -> dict[str, Seen]:
    """Statistics of every quantizer of the task by its site, over the batches."""
    seen = {name.replace("/", "."): Seen() for name in task.quantizers}
    with _hooked(task, seen):
        for single in singly(batches):
            task.loss(single)
    return {name: each for name, each in seen.items() if each.power}


def sides(folder: str) -> tuple[dict[str, Seen], dict[str, Seen]]:
    """Statistics by site for the float model and for the run's model, on its calibration data.

    The float model gets the same quantizers, with ranges from its own activations. Raises UserError
    if the run's activations are float.
    """
    cfg, source = results.config(folder), FromRun(folder)
    kinds = instantiate(cfg.method).activations
    origin = source.origin()
    before = as_task(origin, origin.loaded(), cfg)
    batches: list[Batch] = instantiate(cfg.calibration)(before)
    quantize_activations(before, kinds, lambda: batches)
    if not before.quantizers:
        raise UserError(
            f"run={folder}: its activations are float, so no range matters; choose a run with "
            "activation=int8_tensor or another quantized activation"
        )
    seen = watch(before, batches)
    del before
    loaded = source.loaded()
    after = as_task(source, loaded, cfg)
    loaded.finish(after)
    return seen, watch(after, batches)


def draw(before: Mapping[str, Seen], after: Mapping[str, Seen], site: str) -> Picture:
    """Ranges of channels at `site`, sorted by their maximum in the float model, with a scale per
    model; below them the errors of all sites."""
    picture = Picture(figure(11.0, 7.0))
    grid = picture.figure.add_gridspec(2, 2)
    order = torch.maximum(-before[site].low, before[site].high).argsort(descending=True)
    for index, (side, seen) in enumerate(zip(SIDES, (before, after), strict=True)):
        axes = picture.figure.add_subplot(grid[0, index])
        low, high = seen[site].low[order], seen[site].high[order]
        axes.vlines(range(len(order)), low, high, color=COLOURS[index], linewidth=0.8)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(f"{side}: {site}", loc="left", fontsize=9)
        axes.set_xlabel("channel, by its reach in the float model")
        axes.set_ylabel("range")
    axes = picture.figure.add_subplot(grid[1, :])
    names = [name for name in before if name in after]
    for index, (side, seen) in enumerate(zip(SIDES, (before, after), strict=True)):
        errors = [seen[name].error for name in names]
        axes.plot(errors, "o^"[index], color=COLOURS[index], markersize=4, label=side)
    axes.plot(names.index(site), after[site].error, "o", mfc="none", mec="black", markersize=11)
    axes.set_yscale("log")
    axes.set_xlabel("site, in the order of execution")
    axes.set_ylabel("squared error / square of the tensor")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main(arguments: Sequence[str]) -> None:
    """The command line of `qexp ranges`."""
    parser = argparse.ArgumentParser(prog="qexp ranges", description=__doc__)
    parser.add_argument("run", help="the folder of a run with quantized activations")
    parser.add_argument("--site", help="whose channels; the one whose error fell most by default")
    parser.add_argument("--out", type=Path, help="a .png; ranges.png in the run's folder")
    chosen = parser.parse_args(arguments)
    before, after = sides(chosen.run)
    falls = {name: before[name].error - after[name].error for name in before if name in after}
    site = chosen.site or max(falls, key=falls.__getitem__)
    if site not in falls:
        raise UserError(f"--site {site}: there is no such site; known are {', '.join(falls)}")
    for side, seen in zip(SIDES, (before, after), strict=True):
        found = seen[site]
        low, high = float(found.low.min()), float(found.high.max())
        print(f"{site}, {side}: {low:.4g} to {high:.4g}, error {found.error:.3g}")
    out = chosen.out or Path(chosen.run) / "ranges.png"
    draw(before, after, site).png(out)
    print(out)


@contextmanager
def _hooked(task: Task, seen: Mapping[str, Seen]) -> Iterator[None]:
    def hook(found: Seen) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.add(args[0], output)

        return add

    handles = [
        quantizer.register_forward_hook(hook(found))
        for quantizer, found in zip(task.quantizers.values(), seen.values(), strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
