"""Rotation of the residual stream (QuaRot, 2404.00456, without its online rotations)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import Channels, channels_of

Matrix = Float[Tensor, "width width"]


@dataclass(frozen=True)
class Rotate(Step):
    """x → Q x for every vector of the stream: embeddings and writers turn their outputs, readers
    (after norms gave their weights to them) and head their inputs.

    An embedding E that was the head too becomes two matrices: the embedding is E Qᵀ, but the head,
    which takes the weights g of the final norm, E diag(g) Qᵀ. One matrix would need Q diag(g) Qᵀ
    between norm and head, which no family has a place for. `weight/bits` counts the second one.

    Q is folded into the outputs of the embeddings and of linears that write to the stream, and into
    the inputs of linears that read from it and of the head. The weights of norms are first moved
    into the linears behind them. Tied embeddings are untied.

    kind: `hadamard` (Sylvester's, with random signs; for a width 2^k m, its Kronecker product with
    a random orthogonal m by m matrix), `random` (uniform over the orthogonal group), or `identity`
    (Q = I: norms are folded and nothing is rotated, the control of what the folding costs).

    Q maps the vector of ones to itself, so the mean that a LayerNorm subtracts is unchanged, and
    LayerNorms need no conversion to RMS norms.
    """

    kind: str = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random", "identity"):
            raise UserError(
                f"transform.kind={self.kind} is unknown: give hadamard, random or identity."
            )

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        arch, model = task.arch, task.model
        if not arch.pre_norm:
            raise UserError(
                "transform=rotate: this model family has norms between its branches and the "
                "residual stream, so no rotation can be folded into weights; choose channel scales "
                "(transform=smooth)."
            )
        _untie(task)
        _fold_norms(task)
        generator = torch.Generator().manual_seed(self.seed)
        q = rotation(model.config.hidden_size, self.kind, generator).to(task.device)
        for name in arch.embeddings:
            for module in model.get_submodule(name).modules():
                for parameter in module.parameters(recurse=False):
                    _turn(parameter, q, 0 if isinstance(module, nn.Conv2d) else -1)
        for block in task.blocks:
            for group in arch.groups:
                for name in group.linears:
                    if group.producer in arch.norms:
                        _turn(block.get_parameter(f"{name}.weight"), q, -1)
                    if name in arch.writers:
                        for parameter in block.get_submodule(name).parameters():
                            _turn(parameter, q, 0)
        _turn(model.get_parameter(f"{arch.head}.weight"), q, -1)
        return []


def rotation(width: int, kind: str, generator: torch.Generator) -> Matrix:
    """An orthogonal matrix, float64, that maps the vector of ones to itself."""
    if kind == "identity":
        return torch.eye(width, dtype=torch.float64)
    power = width & -width if kind == "hadamard" else 1
    q = torch.ones(1, 1, dtype=torch.float64)
    while len(q) < power:
        q = torch.cat([torch.cat([q, q], 1), torch.cat([q, -q], 1)]) / 2**0.5
    signs = torch.randint(2, (width,), generator=generator) * 2 - 1
    q = torch.kron(_orthogonal(width // power, generator), q) * signs
    # A Householder reflection maps the image of the ones back to the ones.
    ones = torch.full((width,), width**-0.5, dtype=torch.float64)
    normal = q @ ones - ones
    if float(normal.norm()) < 1e-9:
        return q
    normal /= normal.norm()
    return q - 2 * torch.outer(normal, normal @ q)


def _orthogonal(size: int, generator: torch.Generator) -> Matrix:
    """Uniform over the orthogonal group: the signs of R's diagonal make QR unique."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


def _turn(parameter: Tensor, q: Matrix, axis: int) -> None:
    """Rotates the vectors along an axis."""
    rotated = parameter.data.to(q).movedim(axis, -1) @ q.T
    parameter.data = rotated.movedim(-1, axis).contiguous().to(parameter)


def _fold_norms(task: Task) -> None:
    """Moves the weights and biases of norms into the linears behind them."""
    arch = task.arch
    sites = [c for index in range(len(task.blocks)) for c in channels_of(task, index, "norms")]
    assert arch.norm is not None
    head = task.model.get_submodule(arch.head)
    assert isinstance(head, nn.Linear)
    final = task.model.get_submodule(arch.norm)
    sites.append(Channels(arch.norm, final, (head,), float(arch.unit_offset)))
    for channels in sites:
        parameters = dict(channels.producer.named_parameters(recurse=False))
        channels.shift_into(parameters["bias"].data if "bias" in parameters else None)
        channels.multiply(parameters["weight"].data + channels.offset)
        # not channels.fold, which would divide by the weight, and a weight may be 0
        parameters["weight"].data.fill_(1 - channels.offset)
        if "bias" in parameters:
            parameters["bias"].data.zero_()


def _untie(task: Task) -> None:
    head = task.model.get_submodule(task.arch.head)
    embeddings = (task.model.get_submodule(name) for name in task.arch.embeddings)
    if any(getattr(each, "weight", None) is head.weight for each in embeddings):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        task.model.config.tie_word_embeddings = False
