"""Hessians from the gradients of the model's loss: when and how gradients are computed."""

import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, prod
from statistics import geometric_mean
from types import ModuleType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_choice, check_int, check_number
from qexp.common.frozen import frozen
from qexp.common.numerics import warn_of_slow_bfloat16
from qexp.common.progress import bar
from qexp.grid.scale import DTYPES
from qexp.hessian import gradient_hooks
from qexp.hessian.base import CacheableHessian, ForEachGroup, Measured, OnHessian
from qexp.hessian.float_weights import AtFloatWeights
from qexp.hessian.gradient_hooks import check_dead, watching
from qexp.walk import Block

log = logging.getLogger(__name__)

SCHEDULES = ("per_block", "every_k", "one_pass")
LABELS = ("data", "sampled")
# Above what was measured where OAC was better than SpQR (1.5 to 1.6), below what was measured where
# it was worse (2.6): docs/results/oac.md.
CORRELATED = 2.0
TINY = 1e-30  # of a linear without gradients


@dataclass
class BetweenTokens:
    """Traces of Hessians with the products of different tokens' gradients, in units of those
    without, one of each linear."""

    ratios: list[float] = field(default_factory=list)

    def warn(self) -> None:
        """Log a warning where their geometric mean says that gradients are correlated."""
        positive = [ratio for ratio in self.ratios if ratio > 0]
        if positive and (mean := geometric_mean(positive)) > CORRELATED:
            log.warning(
                "method/hessian=output: its trace is %.2f times the token-weighted Hessian's. "
                "Gradients of different tokens are correlated, as where a model cannot read its "
                "calibration text (calibration.bos, data). OAC was worse than SpQR then, less so "
                "with labels of the model itself: choose method.hessian.labels=sampled.",
                mean,
            )


@dataclass(frozen=True)
class FromGradients(CacheableHessian):
    """Base of Hessians from gradients, each a sum over sequences.

    schedule: `per_block` takes them again at each block, with the blocks before it quantized (the
    paper); `every_k` at every k-th block for the next k; `one_pass` once at float weights.
    sequences: that run together; each keeps its own gradient, so this changes only the speed.
    dtype: of the forward and backward pass; gradients are always multiplied in float32.
    loss_scale: multiplies the loss, against underflow in half precision. It does not change the
    result: solvers do not depend on the scale of H.
    labels: `data` for the next token of the text (empirical Fisher, the paper), `sampled` for
    tokens drawn from the model's own distribution (true Fisher), with `seed`.
    memory: GiB of Hessians that `one_pass` holds at one time; with more, blocks are measured a few
    at a time, one pass each, and kept in the cache on disk.
    """

    schedule: str = "per_block"
    k: int = 4
    sequences: int = 4
    dtype: str = "float32"
    loss_scale: float = 1024.0
    labels: str = "data"
    seed: int = 0
    memory: float = 8.0

    between: ClassVar[bool] = False  # whether it has products of different tokens' gradients

    def __post_init__(self) -> None:
        check_choice("method.hessian", self, schedule=SCHEDULES, dtype=DTYPES, labels=LABELS)
        check_int("method.hessian", self, k=1, sequences=1)
        check_number("method.hessian", self, memory=0, loss_scale=0)
        if not 0 < self.loss_scale < inf:
            raise UserError(
                f"method.hessian.loss_scale={self.loss_scale}: give a finite number above 0."
            )

    @abstractmethod
    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the Hessian of a [rows, columns] linear, and of the sum over sequences."""

    @abstractmethod
    def add(
        self,
        total: Float[Tensor, "..."],
        x: Float[Tensor, "tokens columns"],
        g: Float[Tensor, "tokens rows"],
    ) -> None:
        """Add one sequence to what `finished` makes the Hessian of."""

    @abstractmethod
    def finished(self, total: Float[Tensor, "..."], columns: int) -> Float[Tensor, "..."]:
        """The Hessian, after all sequences; may be `total`, changed."""

    @abstractmethod
    def per_input(
        self, hessian: Float[Tensor, "..."], columns: int
    ) -> Sequence[Float[Tensor, " columns"]]:
        """Of each part of the Hessian that a solver factors by itself, a number for each input, 0
        where it has no gradient: the diagonal where there is one, as a view."""

    @property
    def blocks_per_pass(self) -> int:
        return self.k if self.schedule == "every_k" else 1

    @property
    def divides(self) -> bool:
        return self.labels == "data"  # drawn labels are one stream over all sequences

    @property
    def is_precomputed(self) -> bool:
        return self.schedule == "one_pass"

    def prepare(self, first: Block) -> ForEachGroup:
        if self.is_precomputed:
            return AtFloatWeights(self).prepare(first)
        waiting: dict[str, Tensor] = {}  # of the blocks of the last pass
        between = BetweenTokens()

        def for_each_group(block: Block, on_hessian: OnHessian) -> None:
            if block.index % self.blocks_per_pass == 0 or not waiting:
                stop = min(block.index + self.blocks_per_pass, len(block.task.blocks))
                waiting.update(self._gradient_hessians(block, range(block.index, stop), between))
                if stop == len(block.task.blocks):
                    between.warn()
            for name in block.linears:
                on_hessian((name,), waiting.pop(f"{block.name}.{name}"), None)

        return for_each_group

    def measure(self, first: Block, wanted: Collection[int]) -> Iterator[Measured]:
        """One pass for as many blocks as fit into `memory`."""
        count = len(first.task.blocks)
        shapes = (self.shape(*linear.weight.shape) for linear in first.linears.values())
        size = sum(4 * prod(shape) for shape in shapes)
        span, between = max(int(self.memory * 2**30 / size), 1), BetweenTokens()
        for start in range(first.index, count, span):
            covered = range(start, min(start + span, count))
            inside = [index for index in covered if index in wanted]
            found = self._gradient_hessians(first, covered, between) if inside else {}
            for index in inside:
                prefix = f"{first.task.arch.blocks}.{index}."
                yield index, {name: found[prefix + name] for name in first.linears}
        between.warn()

    @property
    def code(self) -> tuple[ModuleType, ...]:
        return (gradient_hooks,)

    def identity(self, first: Block) -> dict[str, Any]:
        fields = asdict(self)
        for irrelevant in ("schedule", "k", "memory"):
            fields.pop(irrelevant)
        return fields

    def _gradient_hessians(
        self, block: Block, covered: range, between: BetweenTokens
    ) -> dict[str, Float[Tensor, "..."]]:
        """Hessians of the linears of the blocks in `covered`, which starts at `block` or later."""
        task = block.task
        # Of labels of the text, and a loss at every token: what CORRELATED was measured on.
        compared = self.between and self.labels == "data" and task.objective == "causal_lm"
        found: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        apart: dict[str, Tensor] = {}  # the trace without products of different tokens' gradients
        root = task.arch.blocks
        linears = {
            f"{root}.{index}.{name}": task.blocks[index].get_submodule(name)
            for index in covered
            for name in block.linears
        }

        @torch.autocast(task.device.type, enabled=False)
        def take(name: str, x: Tensor, g: Tensor) -> None:
            # Some families flatten sequences into rows on the way (OPT's MLP).
            xs, gs = (part.float().reshape(running, -1, part.shape[-1]) for part in (x, g))
            for x, g in zip(xs, gs, strict=True):
                if name not in found:
                    found[name] = x.new_zeros(self.shape(g.shape[1], x.shape[1]))
                self.add(found[name], x, g)
                if compared:
                    own = x.square().sum(1) @ g.square().sum(1)
                    apart[name] = apart[name] + own if name in apart else own
                for key, part in ((name, x), (f"{name} scored", x[:-1])):
                    used = (part != 0).any(0)
                    seen[key] = seen[key] | used if key in seen else used

        total = sum(-(-len(inputs) // self.sequences) for inputs in block.inputs)
        kind, dtype = task.device.type, DTYPES[self.dtype]
        if dtype == torch.bfloat16:
            warn_of_slow_bfloat16("method.hessian.dtype=bfloat16", kind)
        with (
            torch.enable_grad(),
            frozen(task),
            watching(linears, take),
            task.labels(self.labels, self.seed),
            torch.autocast(kind, dtype, enabled=self.dtype != "float32"),
        ):
            losses = block.losses(self.sequences)
            for loss, running in bar(losses, f"gradients from block {block.index}", total):
                (loss * running * self.loss_scale).backward()
        for name, added in found.items():
            columns = len(seen[name])
            hessian = found[name] = self.finished(block.share.sum(added), columns)
            for key in (name, f"{name} scored"):
                seen[key] = block.share.max(seen[key].to(torch.uint8)).bool()
            diagonals = self.per_input(hessian, columns)
            if compared:
                trace = sum(float(diagonal.sum()) for diagonal in diagonals)
                between.ratios.append(trace / max(float(block.share.sum(apart[name])), TINY))
            for diagonal in diagonals:
                check_dead(name, diagonal, seen[name], seen[f"{name} scored"])
        return found
