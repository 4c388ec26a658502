"""Interface of transforms and methods, and their record of each quantized linear."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexp.data.recipe import Recipe
from qexp.packed.base import Packed
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.task import Batches, Task

ADDED = 16  # bits of each number that a step added to the model, which models are shipped in


@dataclass(frozen=True)
class Record:
    """One quantized linear.

    error_before, error: tr(Δ H Δᵀ) / tr(W H Wᵀ) of round-to-nearest on the same grid and of the
    method, with the method's Hessian (the identity where it uses none). bits: per weight, counted
    from storage. paper_bits: as the method's paper counts them, where that differs. damp: share of
    the mean diagonal of H. seconds: of the solver. option: bits of its codes, where a rule chose
    them.
    """

    name: str
    rows: int
    columns: int
    bits: float
    error_before: float
    error: float
    damp: float
    seconds: float
    packed: Packed
    paper_bits: float | None = None
    option: int | None = None


class Step(ABC):
    """A change of the model in place."""

    @abstractmethod
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        """Change task.model in place. `batches` is called only by a step that calibrates."""

    def recipes(self) -> Mapping[str, Recipe]:
        """Data that the step reads in addition to the calibration batches, by purpose."""
        return {}

    @property
    def activations(self) -> Sequence[Activations]:
        """Schemes whose quantizers the step leaves in the model."""
        return ()

    @property
    def leaves_maps(self) -> bool:
        """Whether the weights need the online maps that the step leaves in the model."""
        return False


@dataclass(frozen=True)
class Nothing(Step):
    """No change of the weights: the float model, or quantization of activations only."""

    activations: tuple[Activations, ...] | list[Activations] = ()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        quantize_activations(task, self.activations, batches)
        return []


def storage(records: list[Record], numbers: int = 0, online: int = 0) -> dict[str, float]:
    """Measured bits per quantized weight over all linears, how many weights those are, and
    the bits that the method's paper would print, where it counts otherwise.

    numbers: that steps added to the model (a head untied by a rotation, biases), which storage must
    keep too. They are part of `weight/bits`; `weight/added_bits` says which part. online: bits of
    online maps; `weight/online_bits` likewise."""
    weights = sum(record.rows * record.columns for record in records)
    if not weights:
        return {}
    bits = sum(record.bits * record.rows * record.columns for record in records)
    parts = {"added": ADDED * numbers / weights, "online": online / weights}
    error = sum(record.error for record in records) / len(records)
    metrics = {
        "weight/bits": bits / weights + sum(parts.values()),
        "weight/count": float(weights),
        "weight/error": error,
    }
    metrics |= {f"weight/{name}_bits": more for name, more in parts.items() if more}
    printed = [(r.paper_bits, r.rows * r.columns) for r in records if r.paper_bits is not None]
    if printed:
        total = sum(bits * count for bits, count in printed)
        metrics["weight/paper_bits"] = total / sum(count for _, count in printed)
    return metrics
