"""Division of the linears of a block among the processes of a run, which solve them."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from qexp.common import collectives
from qexp.hessian.base import ForEachGroup
from qexp.methods.journal import packed_block, unpacked_block
from qexp.solvers.base import Moments
from qexp.step import Record
from qexp.walk import Block

# Rounds linears (by full name) that share a Hessian.
Solve = Callable[[Mapping[str, nn.Linear], Tensor, Moments | None], list[Record]]


def rounded_block(
    block: Block, for_each_group: ForEachGroup, solve: Solve, waits: bool
) -> list[Record]:
    """Round the linears of a block; each process of the run solves its own and gets the others.

    waits: the Hessian of a group depends on the rounding of the groups before it, so that a group
    is finished before the next one is measured. Otherwise several processes collect all Hessians of
    the block and solve at the same time.
    """
    linears, records = block.linears, list[Record]()
    jobs: list[tuple[tuple[str, ...], Tensor, Moments | None]] = []
    waits = waits or collectives.is_single_process()

    def finish(names: Iterable[str]) -> None:
        names = list(names)
        mine = own({name: linears[name] for name in names})

        def solved() -> list[Record]:
            made = []
            for members, hessian, moments in jobs:
                chosen = {f"{block.name}.{n}": linears[n] for n in members if n in mine}
                made += solve(chosen, hessian, moments) if chosen else []
            return made

        full = [f"{block.name}.{name}" for name in names]
        records.extend(_of_all(block, full, solved))
        jobs.clear()

    def on_hessian(names: tuple[str, ...], hessian: Tensor, moments: Moments | None) -> None:
        jobs.append((names, hessian, moments))
        if waits:
            finish(names)

    for_each_group(block, on_hessian)
    if not waits:
        finish(linears)
    return records


def own(linears: Mapping[str, nn.Linear]) -> set[str]:
    """The names of the linears that this process solves. The largest are assigned first, each to
    the process with the least work so far, which grows with rows · columns²."""
    work, mine = [0] * collectives.count(), set()
    for name, linear in sorted(linears.items(), key=lambda pair: -_work(pair[1])):
        owner = work.index(min(work))
        work[owner] += _work(linear)
        if owner == collectives.rank():
            mine.add(name)
    return mine


def _of_all(block: Block, names: list[str], solve: Callable[[], list[Record]]) -> list[Record]:
    """The records of what `solve` rounds in each process, in the order of the full `names`. The
    linears of the other processes get the weights of their records. Raises in every process what
    `solve` raises in one."""
    if collectives.is_single_process():
        return solve()
    records: list[Record] = []

    def pack() -> dict[str, Tensor]:
        records.extend(solve())
        return packed_block(records)

    for rank, packed in enumerate(collectives.exchanged(pack)):
        if rank != collectives.rank():
            others = unpacked_block(packed)
            others.restore(block.task)
            records += others.records
    return sorted(records, key=lambda record: names.index(record.name))


def _work(linear: nn.Linear) -> int:
    return linear.out_features * linear.in_features**2
