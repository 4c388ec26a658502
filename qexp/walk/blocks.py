"""The loop over the blocks of a model, each with the data that reaches it.

The inputs of the first block, and the other arguments of every block (masks, rotary tables), are
recorded in one pass in which the blocks return their input unchanged. Each block is then run on its
own inputs. A change that the caller makes to a block reaches the blocks after it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256

import psutil
import torch
from torch import Tensor, nn

from qexp.arch import Group
from qexp.common import collectives, heap, on_disk, ranks
from qexp.common.cache import checksum
from qexp.common.collectives import WHOLE, Share
from qexp.common.errors import UserError
from qexp.common.progress import bar
from qexp.task import Batch, Task
from qexp.walk.capture import (
    Chunk,
    Enough,
    bypass_blocks,
    capture_calls,
    divided,
    replace_input,
    returns_tuple,
    rows,
    split,
)

# Called with the names of linears that share an input and with that input, once all of it is
# known, as chunks [..., columns].
OnInputs = Callable[[tuple[str, ...], Iterator[Tensor]], None]

log = logging.getLogger(__name__)


@dataclass
class Block:
    """One transformer block and the data that reaches it. Names of linears are relative to it.

    share: which of the walk's sequences the chunks have; what is summed over them is to be summed
    over the processes too.
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
        to weights reaches the groups after it. One forward with one chunk, else one for each group,
        which ends at the group."""
        self._visit(on_inputs)

    def advance(self, on_inputs: OnInputs) -> None:
        """As `observe`, and settle the block with its outputs. With one chunk these come from the
        forward that showed the inputs, so that the walk needs no second one."""
        self.settle(self._visit(on_inputs) or list(self.outputs()))

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

    def _visit(self, on_inputs: OnInputs) -> list[Tensor]:
        if len(self.chunks) > 1:
            for group in self.groups:
                on_inputs(group.linears, self._inputs_of(group))
            return []
        with ExitStack() as hooks:
            for group in self.groups:
                hooks.enter_context(self._showing(group, on_inputs))
            return [self._run(self.chunks[0])]

    def _inputs_of(self, group: Group) -> Iterator[Tensor]:
        seen: list[Tensor] = []
        for chunk in self.chunks:

            def look(_: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
                seen.extend(inputs)
                raise Enough  # what comes after this group in the block is not needed

            with self._showing(group, look), suppress(Enough):
                self._run(chunk)
            yield seen.pop()

    @contextmanager
    def _showing(self, group: Group, on_inputs: OnInputs) -> Iterator[None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            on_inputs(group.linears, iter([args[0]]))

        handle = self.module.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()  # no_grad of a generator does not cover what its caller calls
    def _run(self, chunk: Chunk) -> Tensor:
        args, kwargs = chunk.calls[self.index]
        output = self.module(chunk.hidden.to(self.task.device), *args, **kwargs)
        output = (output[0] if self.returns_tuple else output).to(chunk.hidden.device)
        return on_disk.copied(output) if on_disk.is_mapped(chunk.hidden) else output


@torch.no_grad()
def walk(
    task: Task, batches: Sequence[Batch], chunk: int | None = None, divide: bool = False
) -> Iterator[Block]:
    """Yield each block with the data that reaches it.

    chunk: sequences that run together; None runs each batch as a whole if the device's memory
    allows, else as many sequences as fit. The inputs of a block are kept on the device of its
    weights, which is the host for an offloaded model, and on disk where they are more than
    `task.workspace.memory`. divide: each process of the run has a part of the sequences
    (`Block.share`); otherwise, and where there are fewer than processes, each has all. UserError
    where there are no sequences.
    """
    share = Share(divide and 1 < collectives.count() <= sum(map(rows, batches)))
    own = divided(batches, collectives.rank(), collectives.count()) if share.divided else batches
    parts = [part for batch in own for part in split(batch, chunk or _fitting(task, batch))]
    if not parts:
        raise UserError(
            "calibration: there are no sequences, and this method or transform looks at some; "
            "choose a recipe, for example calibration=first"
        )
    tuples = returns_tuple(task, parts[0])
    chunks = [capture_calls(task, part, tuples) for part in parts]
    if sum(each.hidden.nbytes for each in chunks) > task.workspace.memory:
        for each in chunks:
            each.hidden = on_disk.copied(each.hidden)
    described = f"{task.model.config.to_json_string()} {task.quantizers!r} {task.maps!r}"
    modules = (task.model, task.quantizers, task.maps)
    states = [*(dict(module.state_dict()) for module in modules), *batches]
    origin = sha256(described.encode()).hexdigest() + "".join(map(checksum, states))
    arch, module = task.arch, task.blocks[0]
    first = Block(0, f"{arch.blocks}.0", module, arch.groups, chunks, task, tuples, origin, share)
    yield from _visited(first)


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


def _fitting(task: Task, batch: Batch) -> int:
    """The number of sequences whose activations inside a block fit into half of the free memory."""
    widths = [linear.out_features for linear in task.linears().values()]
    tokens = batch["input_ids"].shape[1] if "input_ids" in batch else _patches(task)
    # The widest result three times (gate, up, product), the stream and what attention holds.
    floats = tokens * (3 * max(widths) + 6 * task.model.config.hidden_size)
    each = floats * max(next(task.parameters()).element_size(), 2)
    fitting = max(int(_free(task.device) / 2 / each), 1)
    if fitting < rows(batch):
        log.info("%d of %d sequences at a time: all do not fit the memory", fitting, rows(batch))
    return min(fitting, rows(batch))


def _patches(task: Task) -> int:
    config = task.model.config
    return (config.image_size // config.patch_size) ** 2 + 1


def _free(device: torch.device) -> int:
    query = getattr(torch.get_device_module(device), "mem_get_info", None)
    if query is not None:
        return query(device)[0]
    return psutil.virtual_memory().available // (ranks.world() // ranks.nodes())
