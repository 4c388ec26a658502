"""Selection of the trainable parameters of a fake-quantized model."""

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
    """A low-rank update of a frozen weight (LoRA, 2106.09685), added before rounding.

    It changes only the codes, so the quantized model needs no extra parameters.
    """

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
    """The kinds of parameters that train; all others are frozen.

    weights: all parameters of the model, except norms. embeddings: among these, the embeddings and
    the head, which are one matrix in many models. norms: parameters of norms. scales: scales of
    weight quantizers, their rounding variables and codes. ranges: scales and zero points of static
    activation quantizers. Scales, codes and zero points train only if the scale rule made them
    trainable. channels: channel scales that a method added before quantizers (Quadapter). rank: of
    a low-rank update of every quantized weight with factor alpha / rank; 0 for none.
    """

    weights: bool = True
    norms: bool = True
    scales: bool = True
    ranges: bool = True
    offsets: bool = False
    channels: bool = False
    rank: int = 0
    alpha: float = 16.0
    embeddings: bool = True

    def __post_init__(self) -> None:
        check_int(None, self, rank=0)
        check_positive(None, self, "alpha")

    def prepare(self, linears: Iterable[nn.Linear]) -> None:
        """Adds low-rank updates; must be called before weight quantizers are attached."""
        if self.rank:
            for linear in linears:
                update = LowRank(linear, self.rank, self.alpha)
                parametrize.register_parametrization(linear, "weight", update, unsafe=True)

    def parameters(self, task: Task) -> Mapping[str, list[nn.Parameter]]:
        """The trainable parameters by kind; sets requires_grad of all parameters."""
        chosen: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
        for kind, parameter, wanted in self._all(task):
            parameter.requires_grad_(wanted)
            if wanted:
                chosen[kind].append(parameter)
        # each only once: a tied head is the embedding
        return {kind: list({id(p): p for p in group}.values()) for kind, group in chosen.items()}

    def _all(self, task: Task) -> Iterator[tuple[str, nn.Parameter, bool]]:
        norms = _norms(task)
        outside = set() if self.embeddings else _embeddings(task)
        for module in task.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, FakeWeight | FakeQuant):
                    chosen = self.scales if isinstance(module, FakeWeight) else self.ranges
                    yield module.kinds[name], parameter, parameter.requires_grad and chosen
                elif isinstance(module, Alpha):
                    yield "channels", parameter, self.channels
                elif isinstance(module, LowRank):
                    yield "weights", parameter, True
                elif module in norms:
                    yield "weights", parameter, self.norms
                else:
                    yield "weights", parameter, self.weights and module not in outside


def _embeddings(task: Task) -> set[nn.Module]:
    names = (*task.arch.embeddings, task.arch.head)
    return {module for name in names for module in task.model.get_submodule(name).modules()}


def _norms(task: Task) -> set[nn.Module]:
    arch = task.arch
    norms = {block.get_submodule(name) for block in task.blocks for name in arch.norms}
    return norms | ({task.model.get_submodule(arch.norm)} if arch.norm is not None else set())
