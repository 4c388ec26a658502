"""The model, block by block: the only loop of the project that visits blocks.

The inputs of the first block, and the other arguments of every block (masks, rotary tables), are
recorded in one pass in which the blocks hand their input on untouched. Each block is then run
alone on what reaches it, and what the caller does to it before asking for the next one is felt
downstream.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from qexp.arch import Group
from qexp.cache import checksum
from qexp.progress import bar
from qexp.task import Batch, Task

# Called with the names of linears that share an input and with that input, once all of it is
# known, as chunks [..., columns].
Visit = Callable[[tuple[str, ...], Iterator[Tensor]], None]


log = logging.getLogger(__name__)


class Call(NamedTuple):
    """The arguments of one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Piece:
    """Sequences that run together: their batch, the current block's input, each block's call."""

    batch: Batch
    hidden: Tensor
    calls: list[Call]


@dataclass
class Block:
    """One transformer block and the data that reaches it. Names of linears are relative to it."""

    index: int
    name: str
    module: nn.Module
    groups: tuple[Group, ...]
    pieces: list[Piece]
    task: Task
    returns_tuple: bool
    notes: dict[str, Tensor]  # shared by the blocks of one walk: what was measured ahead
    origin: str  # checksum of the model's weights and the batches as the walk began
    left: list[Tensor] | None = None  # outputs that `advance` settled

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """In execution order."""
        found = {}
        for name in (name for group in self.groups for name in group.linears):
            linear = self.module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            found[name] = linear
        return found

    @property
    def inputs(self) -> list[Tensor]:
        return [piece.hidden for piece in self.pieces]

    def outputs(self) -> Iterator[Tensor]:
        """Replay this block, as it stands, on the inputs that reach it."""
        return (self._run(piece) for piece in self.pieces)

    def observe(self, visit: Visit) -> None:
        """Show each group its input, in execution order; what `visit` does to the weights is felt
        by the groups after it. One forward with one piece; with several, one forward per group."""
        self._visit(visit)

    def advance(self, visit: Visit) -> None:
        """As `observe`, and what comes out is what the next block receives: with one piece the
        forward that showed the inputs, so that the walk needs no second one."""
        self.left = self._visit(visit) or list(self.outputs())

    def losses(self, sequences: int = 1) -> Iterator[tuple[Tensor, int]]:
        """The model's mean loss on so many sequences at a time, and how many those are, computed
        from this block's inputs on. Where gradients are enabled, the inputs require them, so that
        backward reaches every later layer and ends here."""
        earlier = self.task.blocks[: self.index]
        for piece in self.pieces:
            parts = zip(_split(piece.batch, sequences), piece.hidden.split(sequences), strict=True)
            for batch, hidden in parts:
                entry = hidden.detach().requires_grad_(torch.is_grad_enabled())
                with _passing(earlier, self.returns_tuple), _entering(self.module, entry):
                    yield self.task.loss(batch), len(hidden)

    def _visit(self, visit: Visit) -> list[Tensor]:
        if len(self.pieces) > 1:
            for group in self.groups:
                visit(group.linears, self._inputs_of(group))
            return []
        with ExitStack() as hooks:
            for group in self.groups:
                hooks.enter_context(self._showing(group, visit))
            return [self._run(self.pieces[0])]

    def _inputs_of(self, group: Group) -> Iterator[Tensor]:
        seen: list[Tensor] = []
        for piece in self.pieces:
            with self._showing(group, lambda _, inputs: seen.extend(inputs)):
                self._run(piece)
            yield seen.pop()

    @contextmanager
    def _showing(self, group: Group, visit: Visit) -> Iterator[None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            visit(group.linears, iter([args[0]]))

        handle = self.module.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()  # a generator's own no_grad does not reach what its caller calls
    def _run(self, piece: Piece) -> Tensor:
        args, kwargs = piece.calls[self.index]
        output = self.module(piece.hidden.to(self.task.device), *args, **kwargs)
        return (output[0] if self.returns_tuple else output).to(piece.hidden.device)


@torch.no_grad()
def walk(task: Task, batches: Sequence[Batch], chunk: int | None = None) -> Iterator[Block]:
    """Yield each block with the data that reaches it.

    chunk: sequences that run together; None runs each batch whole if the device's memory allows,
    else as many as fit. Inputs of a block rest where its weights do, which for an offloaded model
    is the host.
    """
    parts = [part for batch in batches for part in _split(batch, chunk or _fitting(task, batch))]
    returns_tuple = _returns_tuple(task, parts[0])
    pieces = [_record(task, part, returns_tuple) for part in parts]
    notes: dict[str, Tensor] = {}
    origin = "".join(map(checksum, [dict(task.model.state_dict()), *batches]))
    for index, module in enumerate(bar(task.blocks, "blocks")):
        name = f"{task.arch.blocks}.{index}"
        block = Block(
            index, name, module, task.arch.groups, pieces, task, returns_tuple, notes, origin
        )
        yield block
        if index + 1 < len(task.blocks):
            for piece, output in zip(pieces, block.left or block.outputs(), strict=True):
                piece.hidden = output


def _split(batch: Batch, chunk: int) -> list[Batch]:
    return [
        {key: value[start : start + chunk] for key, value in batch.items()}
        for start in range(0, _rows(batch), chunk)
    ]


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _fitting(task: Task, batch: Batch) -> int:
    """How many sequences' activations inside a block fit into half of the free memory."""
    widths = [linear.out_features for linear in task.linears().values()]
    tokens = batch["input_ids"].shape[1] if "input_ids" in batch else _patches(task)
    # The widest result three times (gate, up, product), the stream and what attention holds.
    floats = tokens * (3 * max(widths) + 6 * task.model.config.hidden_size)
    each = floats * max(next(task.parameters()).element_size(), 2)
    fitting = max(int(_free(task.device) / 2 / each), 1)
    if fitting < _rows(batch):
        log.info("%d of %d sequences at a time: all do not fit the memory", fitting, _rows(batch))
    return min(fitting, _rows(batch))


def _patches(task: Task) -> int:
    config = task.model.config
    return (config.image_size // config.patch_size) ** 2 + 1


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _record(task: Task, batch: Batch, returns_tuple: bool) -> Piece:
    calls: list[tuple[Tensor, Call]] = []
    with _passing(task.blocks, returns_tuple, calls):
        task.encode(batch)
    hidden = calls[0][0].to(next(task.blocks[0].parameters()).device)
    return Piece(batch, hidden, [call for _, call in calls])


def _returns_tuple(task: Task, batch: Batch) -> bool:
    """Whether the blocks of this family return a tuple; transformers has both kinds."""
    kinds: list[bool] = []
    handle = task.blocks[0].register_forward_hook(
        lambda _, __, output: kinds.append(isinstance(output, tuple))
    )
    task.encode({key: value[:1] for key, value in batch.items()})
    handle.remove()
    return kinds[0]


@contextmanager
def _passing(
    blocks: Iterable[nn.Module],
    returns_tuple: bool,
    seen: list[tuple[Tensor, Call]] | None = None,
) -> Iterator[None]:
    """Blocks hand their input on untouched, and note what they were called with."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if seen is not None:
            seen.append((hidden, Call(args, kwargs)))
        return (hidden,) if returns_tuple else hidden

    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own method shows again


@contextmanager
def _entering(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """The block reads `hidden` whatever it is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (hidden.to(args[0].device), *args[1:]), kwargs

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
