"""Activation quantization schemes: placement, grid, static or dynamic ranges; calibration."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.common import collectives
from qexp.common.collectives import Share
from qexp.common.errors import FieldError, UserError, check_number
from qexp.common.progress import bar
from qexp.grid import Grid
from qexp.grid.clipping import Rounding
from qexp.grid.codebook import CodebookGrid
from qexp.quantizers.activation import FakeQuant, around_outliers
from qexp.quantizers.learned_levels import learn_levels
from qexp.quantizers.placement import Placement
from qexp.task import Batch, Batches, Task, singly


class Activations(ABC):
    @abstractmethod
    def sites(self, task: Task) -> list[str]:
        """The names of what `put` makes."""

    @abstractmethod
    def put(self, task: Task) -> dict[str, FakeQuant]:
        """Attach quantizers to the task's model; none rounds before its range is fixed."""

    @abstractmethod
    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        """The tensor as the quantizers will round it, with scales of the tensor itself.

        This is what a transform optimises for. Differentiable, scales included, if `rounding` is.
        """

    @property
    def rowwise(self) -> bool:
        """Whether `rounded` rounds each token without regard to the others."""
        return False


@dataclass(frozen=True)
class FloatActivations(Activations):
    """No quantization of activations."""

    rowwise = True

    def sites(self, task: Task) -> list[str]:
        return []

    def put(self, task: Task) -> dict[str, FakeQuant]:
        return {}

    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        return x


@dataclass(frozen=True)
class QuantizedActivations(Activations):
    """A quantizer at every site of `placement`.

    dynamic: scales of each tensor as it comes. A value inside the grid's range goes to the nearest
    code, at most half a step away, with a gradient of 1. Otherwise scales are fitted once to
    calibration batches, and values beyond the codes are clipped, without a gradient.
    outliers: columns of a tensor with a value of at least this magnitude are not rounded, and no
    scale sees them (LLM.int8, 2208.07339); null: all are rounded.
    """

    placement: Placement
    grid: Grid
    dynamic: bool = False
    outliers: float | int | None = None

    def __post_init__(self) -> None:
        if self.outliers is None:
            return
        check_number(None, self, outliers=0)
        if not self.dynamic:
            raise FieldError(
                f"outliers={self.outliers} with dynamic=false: which columns they are in changes "
                "from tensor to tensor; give dynamic=true, or outliers=null."
            )

    @property
    def rowwise(self) -> bool:
        return self.grid.rowwise and self.outliers is None

    def sites(self, task: Task) -> list[str]:
        return self.placement.names(task)

    def put(self, task: Task) -> dict[str, FakeQuant]:
        made = self.placement(task, lambda: FakeQuant(self.grid, self.dynamic, self.outliers))
        return {name: q for name, q in made.items() if isinstance(q, FakeQuant)}

    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        made = around_outliers(lambda part: self.grid(part, rounding), rows, self.outliers)
        return made.reshape(x.shape).to(x.dtype)


def attach(task: Task, kinds: Sequence[Activations]) -> list[FakeQuant]:
    """Attach the quantizers of every scheme to the model and list them in `task.quantizers`.

    UserError, before any is attached, where two would share a site.
    """
    taken = {name.replace("/", ".") for name in task.quantizers}
    for kind in kinds:
        sites = kind.sites(task)
        if twice := [name for name in sites if name in taken]:
            raise UserError(
                f"activation, kv: {twice[0]} would carry two quantizers, of which only one can "
                "round; give kv=none, or activation/placement=linear_inputs, which leaves keys and "
                "values to kv."
            )
        taken |= set(sites)
    made = {name: quantizer for kind in kinds for name, quantizer in kind.put(task).items()}
    for name, quantizer in made.items():
        if name in task.shares:
            quantizer.narrow(*task.shares[name])
        task.quantizers[name.replace(".", "/")] = quantizer.to(task.device)
    return list(made.values())


@contextmanager
def all_called(task: Task, during: str) -> Iterator[None]:
    """UserError, at the end, for a quantizer that no forward has called: it would have no part in
    the numbers that are said to be its own."""
    silent = set(task.quantizers)
    handles = [
        quantizer.register_forward_pre_hook(lambda _, __, name=name: silent.discard(name))
        for name, quantizer in task.quantizers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if silent := set.intersection(*collectives.gathered(silent)):
        first = next(name for name in task.quantizers if name in silent).replace("/", ".")
        raise UserError(
            f"activation, kv: {during} never called the quantizer of {first} ({len(silent)} of "
            f"{len(task.quantizers)} are silent); give another activation/placement."
        )


@contextmanager
def float_activations(task: Task) -> Iterator[None]:
    """No quantizer of the task rounds."""
    rounding = [q for q in task.quantizers.values() if isinstance(q, FakeQuant) and q.enabled]
    for quantizer in rounding:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in rounding:
            quantizer.enabled = True


@torch.no_grad()
def quantize_activations(task: Task, kinds: Sequence[Activations], batches: Batches) -> None:
    """Attach, fit static ranges and start to round. The ranges are those of unrounded activations
    in the model as it stands: the caller decides whether its weights are rounded by then. The
    sequences are divided among the processes of the run, if no range depends on their order.

    UserError where two kinds share a site or the calibration data do not reach one.
    """
    quantizers = attach(task, kinds)
    static = any(not quantizer.dynamic for quantizer in quantizers)
    levels = any(isinstance(quantizer.grid, CodebookGrid) for quantizer in quantizers)
    parts = singly(batches()) if static or levels else []
    if (static or levels) and not parts:
        raise UserError(
            "calibration: there are no sequences, and static ranges and levels of activations are "
            "fitted to some; choose a recipe, for example calibration=first"
        )
    if static:
        for quantizer in quantizers:
            quantizer.start_observing()
        with all_called(task, "calibration"):
            _observe(task, parts, [q for q in quantizers if q.observer is not None])
    for quantizer in quantizers:
        quantizer.fix_range()
    learn_levels(task, quantizers, parts)


def _observe(task: Task, parts: Sequence[Batch], quantizers: Sequence[FakeQuant]) -> None:
    """Run the model on all parts; the observers of every process have seen all of them then."""
    rank, count = collectives.rank(), collectives.count()
    observers = [q.observer for q in quantizers if q.observer is not None]
    share = Share(count > 1 and not any(observer.in_order for observer in observers))
    own = parts[len(parts) * rank // count : len(parts) * (rank + 1) // count]
    if share.divided and rank:
        task.loss(parts[0])  # it fixes the bins of histograms
        for observer in observers:
            observer.restart()
    for part in bar(own if share.divided else parts, "activation ranges"):
        task.loss(part)
    for quantizer in quantizers if share.divided else ():
        assert quantizer.observer is not None
        first, *others = share.gathered(quantizer.observer)
        first.merge(others)
        quantizer.observer = first
