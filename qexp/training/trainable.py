"""Selection of the trainable parameters of a fake-quantized model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from qexp.common.errors import check_int, check_positive
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.adapter import LowRankUpdate
from qexp.quantizers.channel_scale import Alpha
from qexp.quantizers.parametrization import attach_update
from qexp.quantizers.weight import FakeWeight
from qexp.task import Task
from qexp.training.optimizer import KINDS


@dataclass(frozen=True)
class TrainableParameters:
    """The kinds of parameters that train; all others are frozen.

    weights: all parameters of the model, except norms. embeddings: among these, the embeddings and
    the head, which are one matrix in many models. norms: parameters of norms. scales: scales of
    weight quantizers, their rounding variables and codes. ranges: scales and zero points of static
    activation quantizers. Scales, codes and zero points train only if the scale rule made them
    trainable. channels: channel scales that a method added before quantizers (Quadapter). rank: of
    a low-rank update of every quantized weight with factor alpha / rank, merged before rounding; 0
    for none. Low-rank updates that stay (`quantizers.adapter`) always train. frozen: linears of
    every block that keep their start, by role (`Arch.roles`): what round-to-nearest or an earlier
    method stored, or the float weight where weights are not rounded.
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
    frozen: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        check_int(None, self, rank=0)
        check_positive(None, self, "alpha")

    def prepare(self, linears: Iterable[nn.Linear]) -> None:
        """Adds low-rank updates; must be called before weight quantizers are attached."""
        if self.rank:
            for linear in linears:
                weight = linear.weight.detach()
                attach_update(linear, LowRankUpdate.zero(weight, self.rank, self.alpha))

    def frozen_linears(self, task: Task) -> set[str]:
        """Full names of the linears that keep their start. UserError for a role that no linear
        has."""
        kept = task.arch.linears_of(self.frozen, "method.trained.frozen")
        blocks = [f"{task.arch.blocks}.{index}" for index in range(len(task.blocks))]
        return {f"{block}.{name}" for block in blocks for name in kept}

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
        outside |= {task.model.get_submodule(name) for name in self.frozen_linears(task)}
        for module in task.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, FakeWeight | FakeQuant):
                    chosen = self.scales if isinstance(module, FakeWeight) else self.ranges
                    yield module.kinds[name], parameter, parameter.requires_grad and chosen
                elif isinstance(module, Alpha):
                    yield "channels", parameter, self.channels
                elif isinstance(module, LowRankUpdate):
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
