"""Which parameters of a fake-quantized model train."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexp.common.errors import check_int, check_positive
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.channel_scale import Alpha
from qexp.quantizers.weight import FakeWeight
from qexp.task import Task
from qexp.training.optimizer import KINDS


class LowRank(nn.Module):
    """A low-rank change of a frozen weight (2106.09685), made before the weight is rounded, so that
    nothing is left of it afterwards but other codes."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        weight = linear.weight
        self.factor = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, linear.in_features))
        self.up = nn.Parameter(weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.factor * (self.up @ self.down)


@dataclass(frozen=True)
class TrainableParameters:
    """What moves; the rest is frozen. Scales and zero points move only where the scale rule made
    them trainable.

    weights: everything of the model itself. norms: the norms' own parameters. scales: steps of the
    weights. ranges: steps of static activation quantizers, with `offsets` their zero points too.
    channels: scales of channels that a method put before the quantizers (Quadapter).
    rank: of a low-rank change of every quantized weight, 0 for none; alpha / rank is its factor.
    """

    weights: bool = True
    norms: bool = True
    scales: bool = True
    ranges: bool = True
    offsets: bool = False
    channels: bool = False
    rank: int = 0
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_int(None, self, rank=0)
        check_positive(None, self, "alpha")

    def prepare(self, linears: Iterable[nn.Linear]) -> None:
        """Before the weights are rounded."""
        if self.rank:
            for linear in linears:
                made = LowRank(linear, self.rank, self.alpha)
                parametrize.register_parametrization(linear, "weight", made, unsafe=True)

    def parameters(self, task: Task) -> Mapping[str, list[nn.Parameter]]:
        """By kind; all others no longer ask for gradients."""
        chosen: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
        for kind, parameter, wanted in self._all(task):
            parameter.requires_grad_(wanted)
            if wanted:
                chosen[kind].append(parameter)
        # Each once: a tied head is the embedding.
        return {kind: list({id(p): p for p in group}.values()) for kind, group in chosen.items()}

    def _all(self, task: Task) -> Iterator[tuple[str, nn.Parameter, bool]]:
        norms = _norms(task)
        for module in task.modules():
            for name, parameter in module.named_parameters(recurse=False):
                moves = parameter.requires_grad
                if isinstance(module, FakeWeight | FakeQuant):
                    kind = "scales" if name == "scale" else "offsets"
                    own = self.scales if isinstance(module, FakeWeight) else self.ranges
                    yield kind, parameter, moves and own
                elif isinstance(module, Alpha):
                    yield "channels", parameter, self.channels
                elif isinstance(module, LowRank):
                    yield "weights", parameter, True
                else:
                    yield "weights", parameter, self.norms if module in norms else self.weights


def _norms(task: Task) -> set[nn.Module]:
    arch = task.arch
    own = {block.get_submodule(name) for block in task.blocks for name in arch.norms}
    return own | ({task.model.get_submodule(arch.norm)} if arch.norm is not None else set())
