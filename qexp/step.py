"""Interface of transforms and methods, and their record of each quantized linear."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexp.data.recipe import Recipe
from qexp.packed.base import Packed
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.task import Batches, Task


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
