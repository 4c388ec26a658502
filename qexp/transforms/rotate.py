"""Rotations of QuaRot (2404.00456): of the residual stream, of values, and online."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.common.on_disk import assign
from qexp.quantizers.hadamard import hadamard, known
from qexp.quantizers.maps import attention_group, map_inputs, map_keys, refuse_mapped
from qexp.quantizers.online import Factor, OnlineMap, hadamard_factors, orthogonal
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import Channels, channels_of
from qexp.transforms.heads import head_shape, turn_values, value_rotation

Matrix = Float[Tensor, "width width"]


KINDS = ("hadamard", "hadamard_exact", "random", "identity")
ONLINE = ("heads", "down", "keys")


@dataclass(frozen=True)
class Rotate(Step):
    """x → Q x for every vector of the stream (R1): embeddings and writers turn their outputs,
    readers (after norms gave their weights to them) and head their inputs.

    An embedding E that was the head too becomes two matrices: the embedding is E Qᵀ, but the head,
    which takes the weights g of the final norm, E diag(g) Qᵀ. One matrix would need Q diag(g) Qᵀ
    between norm and head, which no family has a place for. `weight/bits` counts the second one.

    Q is folded into the outputs of the embeddings and of linears that write to the stream, and into
    the inputs of linears that read from it and of the head. The weights of norms are first moved
    into the linears behind them. Tied embeddings are untied.

    kind: of Q: `hadamard` (Sylvester's, with random signs; for a width 2^k m, its Kronecker product
    with a random orthogonal m by m matrix), `hadamard_exact` (a known Hadamard matrix of the whole
    width, with random signs), `random` (uniform over the orthogonal group), or `identity` (Q = I:
    norms are folded and nothing is rotated, the control of what the folding costs).
    stream: whether the stream is rotated at all.
    values: R2, a Hadamard matrix on each value head, whose inverse is in the output projection.
    online: `heads`, a Hadamard matrix across the heads that the output projection reads; `down`
    (R4), one on what the last linear of the MLP reads; `keys` (R3), one on each head of the keys
    and of the queries, after a rotary embedding. A number of rows for which none is known takes a
    random orthogonal factor, which is stored.

    Q maps the vector of ones to itself, so the mean that a LayerNorm subtracts is unchanged, and
    LayerNorms need no conversion to RMS norms.
    """

    kind: str = "hadamard"
    seed: int = 0
    stream: bool = True
    values: bool = False
    online: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"transform.kind={self.kind} is unknown: give hadamard, random or identity, or "
                "hadamard_exact."
            )
        if unknown := set(self.online) - set(ONLINE):
            raise UserError(
                f"transform.online={list(self.online)}: {sorted(unknown)[0]} is unknown; give a "
                f"list of {', '.join(ONLINE)}."
            )

    @property
    def leaves_maps(self) -> bool:
        return bool(self.online)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        if self.stream:
            check_stream(task)
        blocks = range(len(task.blocks))
        for block in blocks:
            self.check_maps(task, block)
        if self.stream:
            untie(task)
            fold_norms(task)
            q = rotation(task.model.config.hidden_size, self.kind, seeded(self.seed))
            turn_stream(task, q.to(task.device))
        generator = seeded(self.seed + 1)
        for block in blocks:
            if self.values:
                turn_values(task, block, value_rotation(head_shape(task, block)[1], generator))
            self.put_maps(task, block, generator)
        return []

    def check_maps(self, task: Task, block: int) -> None:
        """UserError, before anything is changed, where online maps are in the way."""
        arch = task.arch
        if self.stream:
            for group in arch.groups:
                if group.producer in arch.norms:
                    refuse_mapped(task, block, group)
        if self.values or "heads" in self.online:
            refuse_mapped(task, block, attention_group(task))
        if "down" in self.online:
            refuse_mapped(task, block, arch.groups[-1])
        if self.values and attention_group(task).producer is None and "heads" not in self.online:
            raise UserError(
                f"transform.values=true: {arch.groups[0].linears[0]} makes values together with "
                "queries, so that their rotation is part of an online one; add heads to "
                "transform.online, or give values=false."
            )

    def put_maps(self, task: Task, block: int, generator: torch.Generator) -> None:
        """The online maps of a block."""
        group, last = attention_group(task), task.arch.groups[-1]
        heads, size = head_shape(task, block)
        if "heads" in self.online:
            fused = self.values and group.producer is None
            inner = hadamard_factors(size, generator) if fused else [Factor("identity", size)]
            made = OnlineMap([*hadamard_factors(heads, generator), *inner])
            map_inputs(task, block, group, made)
        if "down" in self.online:
            width = task.blocks[block].get_parameter(f"{last.linears[0]}.weight").shape[1]
            map_inputs(task, block, last, OnlineMap(hadamard_factors(width, generator)))
        if "keys" in self.online:
            map_keys(task, block, OnlineMap(hadamard_factors(size, generator)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_stream(task: Task) -> None:
    """UserError where no rotation of the residual stream can be folded into weights."""
    if not task.arch.pre_norm:
        raise UserError(
            "transform=rotate: this model family has norms between its branches and the "
            "residual stream, so no rotation can be folded into weights; choose channel scales "
            "(transform=smooth), or only the other rotations (transform=quarot "
            "transform.stream=false)."
        )


def turn_stream(task: Task, q: Matrix) -> None:
    """Rotate every vector of the stream. Norms have no weights any more."""
    arch, model = task.arch, task.model
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


def rotation(width: int, kind: str, generator: torch.Generator) -> Matrix:
    """An orthogonal matrix, float64, that maps the vector of ones to itself."""
    if kind == "identity":
        return torch.eye(width, dtype=torch.float64)
    if kind == "hadamard_exact" and known(width) is None:
        raise UserError(
            f"transform.kind=hadamard_exact: no Hadamard matrix of {width} rows is known here; "
            "give hadamard."
        )
    signs = torch.randint(2, (width,), generator=generator) * 2 - 1
    if kind == "hadamard_exact":
        q = hadamard(width).double() / width**0.5 * signs
    else:
        power = width & -width if kind == "hadamard" else 1
        q = torch.ones(1, 1, dtype=torch.float64)
        while len(q) < power:
            q = torch.cat([torch.cat([q, q], 1), torch.cat([q, -q], 1)]) / 2**0.5
        q = torch.kron(orthogonal(width // power, generator), q) * signs
    # A Householder reflection maps the image of the ones back to the ones.
    ones = torch.full((width,), width**-0.5, dtype=torch.float64)
    normal = q @ ones - ones
    if float(normal.norm()) < 1e-9:
        return q
    normal /= normal.norm()
    return q - 2 * torch.outer(normal, normal @ q)


def _turn(parameter: Tensor, q: Matrix, axis: int) -> None:
    """Rotates the vectors along an axis."""
    rotated = parameter.data.to(q).movedim(axis, -1) @ q.T
    assign(parameter, rotated.movedim(-1, axis).contiguous())


def fold_norms(task: Task) -> None:
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


def untie(task: Task) -> None:
    """Give the head a matrix of its own."""
    head = task.model.get_submodule(task.arch.head)
    embeddings = (task.model.get_submodule(name) for name in task.arch.embeddings)
    if any(getattr(each, "weight", None) is head.weight for each in embeddings):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        task.model.config.tie_word_embeddings = False
