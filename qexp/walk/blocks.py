"""The loop over the blocks of a model, each with the data that reaches it.

The inputs of the first block, and the other arguments of every block (masks, rotary tables), are
recorded in one pass in which the blocks return their input unchanged. Each block is then run on its
own inputs, in chunks of sequences. A change that the caller makes to a block reaches the blocks
after it.

Linears of a group read one input, which exists only where the groups before it have run with their
final weights. So the forward passes of all chunks wait inside the block (each is a greenlet, all in
one thread) until the caller has seen a group's input of each, and go on: one forward pass in all.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from qexp.arch import Group
from qexp.common import collectives, heap, on_disk
from qexp.common.cache import checksum
from qexp.common.collectives import WHOLE, Share
from qexp.common.errors import UserError
from qexp.common.progress import bar
from qexp.task import Batch, Task
from qexp.walk import memory
from qexp.walk.capture import (
    Chunk,
    bypass_blocks,
    capture_calls,
    divided,
    replace_input,
    returns_tuple,
    rows,
    split,
)
from qexp.walk.passes import Pass, waiting

# Called with the names of linears that share an input and with that input, once all of it is
# known, as chunks [..., columns].
OnInputs = Callable[[tuple[str, ...], Iterator[Tensor]], None]


@dataclass
class Block:
    """One transformer block and the data that reaches it. Names of linears are relative to it.

    share: which of the walk's sequences the chunks have; what is summed over them is to be summed
    over the processes too. together: the forward passes of all chunks can wait inside the block at
    the same time; else there is one forward pass for each group, which ends at the group.
    """

    index: int
    name: str
    module: nn.Module
    groups: tuple[Group, ...]
    chunks: list[Chunk]
    task: Task
    returns_tuple: bool
    origin: str  # of the model, its quantizers and the batches as the walk began
    share: Share = WHOLE
    together: bool = True
    _settled: list[Tensor] | None = None  # what the next block receives, if it is known already

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
        return [chunk.hidden for chunk in self.chunks]

    def outputs(self) -> Iterator[Tensor]:
        """The outputs of this block at its present weights, one per chunk."""
        return (self._run(chunk) for chunk in self.chunks)

    def observe(self, on_inputs: OnInputs) -> None:
        """Call `on_inputs` with the input of each group, in execution order. A change that it makes
        to weights reaches the groups after it."""
        self._visit(on_inputs, finish=False)

    def advance(self, on_inputs: OnInputs) -> None:
        """As `observe`, and settle the block with its outputs: where the chunks go together, those
        of the forward pass that showed the inputs, so that the walk needs no second one."""
        self.settle(self._visit(on_inputs, finish=True))

    def settle(self, outputs: list[Tensor]) -> None:
        """Fix what the next block receives: one tensor per chunk."""
        self._settled = outputs

    def skip(self) -> None:
        """Pass the inputs on to the next block, for callers that read no outputs any more."""
        self.settle(self.inputs)

    @property
    def settled(self) -> list[Tensor]:
        """The outputs that `settle` or `advance` fixed. Raises RuntimeError where none are."""
        if self._settled is None:
            raise RuntimeError(f"{self.name}: its outputs are not settled")
        return self._settled

    def onward(self) -> Iterator["Block"]:
        """This block and those after it, as the walk will yield them if nothing is changed."""
        chunks = [replace(chunk) for chunk in self.chunks]
        return _visited(replace(self, chunks=chunks, _settled=None))

    def replay(self, chunk: int, hidden: Tensor) -> Tensor:
        """`hidden` through the block with the other arguments of one chunk, with gradients.

        The block must be on the task's device: the hooks of an offloaded block would move it away
        before the backward pass.
        """
        args, kwargs = self.chunks[chunk].calls[self.index]
        output = self.module.forward(hidden.to(self.task.device), *args, **kwargs)
        return output[0] if self.returns_tuple else output

    def losses(self, sequences: int = 1) -> Iterator[tuple[Tensor, int]]:
        """The model's mean loss on `sequences` sequences at a time, and their number, computed from
        this block's inputs. Where gradients are enabled, the inputs require them, so that
        backward reaches every later layer and ends here."""
        earlier = self.task.blocks[: self.index]
        for chunk in self.chunks:
            parts = zip(split(chunk.batch, sequences), chunk.hidden.split(sequences), strict=True)
            for batch, hidden in parts:
                entry = hidden.detach().requires_grad_(torch.is_grad_enabled())
                with bypass_blocks(earlier, self.returns_tuple), replace_input(self.module, entry):
                    yield self.task.loss(batch), len(hidden)

    def _visit(self, on_inputs: OnInputs, finish: bool) -> list[Tensor]:
        passes: list[Pass] = []
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(waiting(self.module.get_submodule(group.linears[0])))
            if self.together:
                passes += map(self._started, self.chunks)
                for each in passes:
                    stack.callback(each.end)
            for number, group in enumerate(self.groups):
                if not passes:
                    on_inputs(group.linears, map(self._input_of, repeat(number), self.chunks))
                    continue
                inputs = self._all_resumed(passes)
                on_inputs(group.linears, inputs)
                deque(inputs, maxlen=0)  # passes that the caller did not look at wait there too
            if finish and passes:
                return list(map(self._kept, self.chunks, map(self._resumed, passes)))
        return list(self.outputs()) if finish else []

    def _input_of(self, group: int, chunk: Chunk) -> Tensor:
        """What a chunk's linears of a group read, from a forward pass that ends there."""
        started = self._started(chunk)
        try:
            for _ in range(group):
                self._resumed(started)
            return self._resumed(started)
        finally:
            started.end()

    def _forward(self, chunk: Chunk) -> Callable[[], Any]:
        args, kwargs = chunk.calls[self.index]
        return lambda: self.module(chunk.hidden.to(self.task.device), *args, **kwargs)

    def _started(self, chunk: Chunk) -> Pass:
        return Pass(self._forward(chunk))

    def _all_resumed(self, passes: list[Pass]) -> Iterator[Tensor]:
        yield from map(self._resumed, passes)
        heap.trim()  # what they needed between two groups is not needed while they wait

    def _resumed(self, started: Pass) -> Any:
        """Let a forward pass go on: to a group's input, or to the block's output."""
        if next(self.module.parameters()).device != self.task.device:
            on_disk.move(self.module, self.task.device)  # an offloaded one, where one pass ended
        return started.resume()

    @torch.no_grad()  # no_grad of a generator does not cover what its caller calls
    def _run(self, chunk: Chunk) -> Tensor:
        return self._kept(chunk, self._forward(chunk)())

    def _kept(self, chunk: Chunk, output: Any) -> Tensor:
        """The output of a chunk where its input is."""
        output = (output[0] if self.returns_tuple else output).to(chunk.hidden.device)
        return on_disk.copied(output) if on_disk.is_mapped(chunk.hidden) else output


@torch.no_grad()
def walk(
    task: Task, batches: Sequence[Batch], chunk: int | None = None, divide: bool = False
) -> Iterator[Block]:
    """Yield each block with the data that reaches it.

    chunk: sequences that run together; None takes as many as `memory.at_once`. The inputs of a
    block are kept on the device of its weights, which is the host for an offloaded model, and on
    disk where they are more than `task.workspace.memory`. divide: each process of the run has a
    part of the sequences (`Block.share`); otherwise, and where there are fewer than processes, each
    has all. UserError where there are no sequences.
    """
    share = Share(divide and 1 < collectives.count() <= sum(map(rows, batches)))
    own = divided(batches, collectives.rank(), collectives.count()) if share.divided else batches
    parts = [part for batch in own for part in split(batch, chunk or memory.at_once(task, batch))]
    if not parts:
        raise UserError(
            "calibration: there are no sequences, and this method or transform looks at some; "
            "choose a recipe, for example calibration=first"
        )
    tuples = returns_tuple(task, parts[0])
    chunks = [capture_calls(task, part, tuples) for part in parts]
    spilled = sum(each.hidden.nbytes for each in chunks) > task.workspace.memory
    if spilled:
        for each in chunks:
            each.hidden = on_disk.copied(each.hidden)
    described = f"{task.model.config.to_json_string()} {task.quantizers!r} {task.maps!r}"
    modules = (task.model, task.quantizers, task.maps)
    states = [*(dict(module.state_dict()) for module in modules), *batches]
    origin = sha256(described.encode()).hexdigest() + "".join(map(checksum, states))
    arch, module = task.arch, task.blocks[0]
    together = not spilled and memory.can_wait(task, parts)
    first = Block(0, f"{arch.blocks}.0", module, arch.groups, chunks, task, tuples, origin, share)
    yield from _visited(replace(first, together=together))


def _visited(block: Block) -> Iterator[Block]:
    """This block and those after it; each receives the outputs of the one before, in the same
    chunks."""
    task, chunks = block.task, block.chunks
    for index, module in enumerate(bar(task.blocks[block.index :], "blocks"), block.index):
        block = replace(
            block, index=index, name=f"{task.arch.blocks}.{index}", module=module, _settled=None
        )
        yield block
        if index + 1 < len(task.blocks):
            for chunk, output in zip(chunks, block._settled or block.outputs(), strict=True):
                chunk.hidden = output
        heap.trim()
