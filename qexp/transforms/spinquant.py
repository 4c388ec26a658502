"""SpinQuant (2405.16406): rotations learned with the loss of the quantized model."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common import hashes
from qexp.common.errors import UserError, check_int
from qexp.gradients import Straight
from qexp.grid import Grid
from qexp.quantizers.maps import attention_group
from qexp.quantizers.scheme import Activations, FloatActivations
from qexp.step import Record, Step
from qexp.task import Batch, Batches, Task
from qexp.training.checkpoint import origin_of
from qexp.training.losses import Objective
from qexp.training.module import TrainingSetup
from qexp.training.optimizer import CayleySGD
from qexp.training.trainer import Trainer
from qexp.transforms.channels import parametrized
from qexp.transforms.heads import (
    head_shape,
    turn_values,
    turned_columns,
    turned_rows,
    value_rotation,
)
from qexp.transforms.reconstruction import Changed, rounded_cache, rounded_inputs
from qexp.transforms.rotate import (
    Rotate,
    check_stream,
    fold_norms,
    rotation,
    seeded,
    turn_stream,
    untie,
)

Matrix = Float[Tensor, "width width"]


class Rotation(nn.Module):
    """An orthogonal matrix that trains. keeps_ones: of the start, which maps the vector of ones to
    itself, only what is orthogonal to that vector trains."""

    def __init__(self, start: Matrix, keeps_ones: bool) -> None:
        super().__init__()
        basis = torch.eye(len(start), dtype=torch.float64)
        if keeps_ones:  # a reflection that maps the first unit vector to the ones
            normal = basis[0] - len(start) ** -0.5
            if float(normal.norm()) > 0:
                basis = basis - 2 * torch.outer(normal, normal) / normal.square().sum()
        self.kept = int(keeps_ones)
        self.register_buffer("basis", basis, persistent=False)
        inner = (basis.T @ start.double().cpu() @ basis)[self.kept :, self.kept :]
        self.inner = nn.Parameter(inner.float().contiguous())

    def forward(self, inner: Tensor | None = None) -> Matrix:
        """inner: in place of the parameter, of whose dtype the result is."""
        own = self.inner if inner is None else inner
        basis = self.get_buffer("basis").to(own)
        fixed, free = basis[:, : self.kept], basis[:, self.kept :]
        return fixed @ fixed.T + free @ own @ free.T

    @torch.no_grad()
    def exact(self) -> Matrix:
        """float64, orthogonal to its precision."""
        q, r = torch.linalg.qr(self.inner.double())
        return self(q * r.diagonal().sign())


@dataclass(frozen=True)
class SpinQuant(Step):
    """Learn R1 of the residual stream, and in each block R2 of its value heads, with rounded
    activations and frozen weights; then fold them. Both begin as `start` has them, and so do online
    maps, which do not train.

    round_weights: to `grid` in training, with scales that take no gradient; otherwise they are
    float, the reference's recipe where GPTQ follows. activation, kv: as the method will round
    inputs of linears, and keys and values in a cache. R1 keeps the vector of ones, as `Rotate`.
    """

    start: Rotate
    grid: Grid
    activation: Activations
    kv: Activations
    loss: Objective
    optimizer: CayleySGD
    trainer: Trainer
    round_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("transform", self, seed=0)
        if self.loss.teacher:
            raise UserError("transform.loss: rotations have no teacher; give cross_entropy")
        rounds = [k for k in (self.activation, self.kv) if not isinstance(k, FloatActivations)]
        if not rounds and not self.round_weights:
            raise UserError(
                "transform.round_weights=false: with float activations nothing is rounded while "
                "rotations are learned; give true, or activation=int4_token"
            )
        if not (self.start.stream and self.start.values):
            raise UserError(
                "transform.start: what is learned are the rotations of the stream and of values; "
                "give transform.start.stream=true transform.start.values=true"
            )

    @property
    def leaves_maps(self) -> bool:
        return self.start.leaves_maps

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        check_stream(task)
        blocks = range(len(task.blocks))
        for block in blocks:
            self.start.check_maps(task, block)
        data = batches()
        if not data:
            raise UserError("calibration: rotations are learned on some sequences; choose a recipe")
        identity = f"{origin_of(task, data)} {self!r} {hashes.code()}"
        untie(task)
        with torch.no_grad():
            fold_norms(task)
            generator = seeded(self.start.seed + 1)
            for block in blocks:
                self.start.put_maps(task, block, generator)
        stream, values = self._rotations(task)
        self._train(task, data, stream, values, hashlib.sha256(identity.encode()).hexdigest()[:8])
        with torch.no_grad():
            turn_stream(task, stream.exact())
            for block, learned in enumerate(values):
                turn_values(task, block, learned.exact())
        return []

    def _rotations(self, task: Task) -> tuple[Rotation, list[Rotation]]:
        generator = seeded(self.start.seed)
        q = rotation(task.model.config.hidden_size, self.start.kind, generator)
        values: list[Rotation] = []
        if attention_group(task).producer is not None:
            generator = seeded(self.start.seed + 1)
            for block in range(len(task.blocks)):
                size = head_shape(task, block)[1]
                values.append(Rotation(value_rotation(size, generator), keeps_ones=False))
        return Rotation(q, keeps_ones=True).to(task.device), [v.to(task.device) for v in values]

    def _train(
        self, task: Task, data: list[Batch], stream: Rotation, values: list[Rotation], identity: str
    ) -> None:
        learned = nn.ModuleList([stream, *values])
        flags = {name: p.requires_grad for name, p in task.named_parameters()}
        task.requires_grad_(False)
        task.add_module("rotations", learned)
        try:
            with ExitStack() as stack:
                stack.enter_context(turned(task, stream, values))
                if self.round_weights:
                    rule = partial(nearest, self.grid)
                    for linear in task.linears().values():
                        stack.enter_context(parametrized(linear, "weight", Changed(rule)))
                for block in range(len(task.blocks)):
                    stack.enter_context(rounded_inputs(task, block, self.activation))
                stack.enter_context(rounded_cache(task, range(len(task.blocks)), self.kv))
                self.trainer.fit(
                    TrainingSetup(
                        task,
                        lambda batch: self.loss(task, None, batch),
                        {"rotations": list(learned.parameters())},
                        data,
                        self.optimizer,
                        seed=self.seed,
                        identity=identity,
                        folder=task.workspace.folder,
                    )
                )
        finally:
            del task.rotations
            for name, parameter in task.named_parameters():
                parameter.requires_grad_(flags.get(name, False))


def nearest(grid: Grid, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Rounded, with scales that take no gradient."""
    q = grid.scales_of(weight.detach().float()).map(lambda part: part.reshape(-1, 1))
    made = grid.round(weight.float().reshape(len(q.scale), -1), q, Straight())
    return made.reshape(weight.shape)


@contextmanager
def turned(task: Task, stream: Rotation, values: list[Rotation]) -> Iterator[None]:
    """Within the context, the model is as with these rotations folded. Of the embeddings and the
    head, whose matrices are large, outputs and inputs are turned instead."""
    arch, readers = task.arch, attention_group(task)
    with ExitStack() as stack:
        for index, block in enumerate(task.blocks):
            for group in arch.groups:
                for name in group.linears:
                    linear = block.get_submodule(name)
                    if group.producer in arch.norms:
                        change = Changed(lambda w: w @ stream().T)
                        stack.enter_context(parametrized(linear, "weight", change))
                    if values and group == readers:
                        change = Changed(partial(turned_columns, values[index]))
                        stack.enter_context(parametrized(linear, "weight", change))
                    rows = stream if name in arch.writers else None
                    if values and name == readers.producer:
                        rows = values[index]
                    for kind in ("weight", "bias"):
                        if rows is not None and getattr(linear, kind) is not None:
                            change = Changed(partial(turned_rows, rows))
                            stack.enter_context(parametrized(linear, kind, change))
        handles = [
            task.model.get_submodule(name).register_forward_hook(lambda _, __, y: y @ stream().T)
            for name in arch.embeddings
        ]
        head = task.model.get_submodule(arch.head)
        handles.append(
            head.register_forward_pre_hook(lambda _, args: (args[0] @ stream(), *args[1:]))
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
