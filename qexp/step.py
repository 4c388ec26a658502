"""What transforms and methods both are, and the account they give of each linear."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexp.data.recipe import Recipe
from qexp.packed.base import Packed
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.task import Batches, Task


@dataclass(frozen=True)
class Record:
    """One quantized linear. Errors are shares of the float layer's own: tr(Δ H Δᵀ) / tr(W H Wᵀ)
    with the Hessian of the method (the identity where it uses none); `error_before` is what
    rounding to nearest on the same grid leaves, `error` what the method leaves. `bits` is measured
    from storage; `paper_bits` what the method's paper would print, where it counts otherwise."""

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


class Step(ABC):
    @abstractmethod
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        """Change task.model in place. `batches` is called only by a step that calibrates."""

    def recipes(self) -> Mapping[str, Recipe]:
        """Data of its own beside the calibration batches, by what it is for."""
        return {}

    @property
    def activations(self) -> Sequence[Activations]:
        """Whose quantizers the step leaves in the model."""
        return ()


@dataclass(frozen=True)
class Nothing(Step):
    """Weights as they are."""

    activations: tuple[Activations, ...] | list[Activations] = ()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        quantize_activations(task, self.activations, batches)
        return []
