"""Benchmark of cost laws: seconds and memory of the stages of a GPTQ job on random Llamas, by the
number of operations, and what the laws predict for larger models."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from qexp.commands.bench import laws
from qexp.commands.bench.laws import STAGES, Law
from qexp.commands.bench.sizes import Sizes
from qexp.commands.bench.timing import loaded, peak, products, resident, spent
from qexp.common import heap
from qexp.common.errors import UserError, check_int
from qexp.config.instantiate import instantiate
from qexp.hessian import second_moment
from qexp.methods.blockwise import Blockwise
from qexp.packed.base import Packed
from qexp.packed.shelved import Shelved
from qexp.runs.provenance import processor
from qexp.solvers.base import Solution
from qexp.solvers.wrapper import Wrapper
from qexp.step import Record
from qexp.task import Task
from qexp.walk import walk
from qexp.walk.blocks import OnInputs

MIB = 2**20
AXES = {"width": "hidden", "sequences": "sequences", "blocks": "blocks"}
NARROW = ("forward", "evaluation")  # stages that compute in the model's dtype, others in float32
# Sizes of Llama 2 (2307.09288) and data of GPTQ's experiments (2210.17323, section 4).
LARGE = {
    "7 B": Sizes(4096, 11008, 32, 32, 32000, 32, 128, 2048),
    "70 B": Sizes(8192, 28672, 64, 8, 32000, 80, 128, 2048),
}


@dataclass(frozen=True)
class Scaling:
    """Sizes to measure: one is varied while the others have their value of `middle`, which are
    width, sequences and blocks.

    length: tokens of a sequence, in calibration and evaluation. head: channels of an attention
    head. rate, rate32: operations per second that the hardware of the prediction has in products of
    the model's dtype and of float32; null: those of this machine.
    """

    widths: Sequence[int] = (512, 1024, 2048, 4096)
    sequences: Sequence[int] = (4, 8, 16, 32, 64)
    blocks: Sequence[int] = (2, 4, 8, 16)
    middle: Sequence[int] = (1024, 16, 1)
    length: int = 128
    head: int = 64
    vocabulary: int = 8192
    rate: float | None = None
    rate32: float | None = None

    @staticmethod
    def of(cfg: DictConfig) -> "Scaling":
        """The keys `+scaling.…`. UserError for an unknown one, or sizes that do not fit."""
        node, known = cfg.get("scaling", {}), [each.name for each in fields(Scaling)]
        for key in node:
            if key not in known:
                raise UserError(f"scaling.{key}: is unknown; the keys are {', '.join(known)}")
        made = Scaling(**{str(key): value for key, value in node.items()})
        check_int("scaling", made, length=2, head=1, vocabulary=264)
        for key, values in (("widths", made.widths), ("middle", made.middle[:1])):
            for width in values:
                if width % (4 * made.head):
                    raise UserError(
                        f"scaling.{key}: {width} is no multiple of {4 * made.head}; give a width "
                        "of whole heads, whose number is divided by 4"
                    )
        if len({*made.widths}) == 1 == len({*made.blocks}):
            raise UserError(
                "scaling: sizes differ in sequences alone, on which solving does not depend; give "
                "several widths or blocks"
            )
        return made

    def along(self) -> dict[str, list[Sizes]]:
        """The sizes to measure, by the one that varies; the MLP is 11/4 as wide as the model."""
        width, sequences, blocks = self.middle
        points = {
            "width": [(each, sequences, blocks) for each in self.widths],
            "sequences": [(width, each, blocks) for each in self.sequences],
            "blocks": [(width, sequences, each) for each in self.blocks],
        }
        return {axis: [self._sizes(*point) for point in own] for axis, own in points.items()}

    def _sizes(self, width: int, sequences: int, blocks: int) -> Sizes:
        heads = width // self.head
        shape = (width, 11 * width // 4, heads, heads, self.vocabulary)
        return Sizes(*shape, blocks=blocks, sequences=sequences, length=self.length)


@dataclass(frozen=True)
class Cost:
    """seconds: see `spent`. memory: peak bytes beyond those at the start of the stage. held: bytes
    by the formulas of `--dry-run`."""

    operations: float
    seconds: float
    memory: float
    held: float


Costs = dict[Sizes, dict[str, Cost]]


def scaling(cfg: DictConfig, overrides: list[str]) -> None:
    """Prints the costs of each stage at each size, the exponents that fit them, and seconds of
    larger models."""
    asked = Scaling.of(cfg)
    words = [word for word in overrides if not word.lstrip("+").startswith("scaling.")]
    along, costs = asked.along(), Costs()
    points = list(dict.fromkeys(each for axis in along.values() for each in axis))
    measured(min(points, key=lambda each: laws.operations(each)["solve"]), words)  # warms up
    print(f"{processor()}, {torch.get_num_threads()} threads")
    print(f"{'':<24}{'operations':>11}{'s':>9}{'10⁹/s':>8}{'MiB':>8}{'formula':>9}")
    for sizes in points:
        costs[sizes] = measured(sizes, words)
        print(f"width {sizes.hidden}, {sizes.sequences} sequences, {sizes.blocks} blocks")
        for name, cost in costs[sizes].items():
            line = f"  {name:<22}{cost.operations:11.2e}{cost.seconds:9.2f}"
            line += f"{cost.operations / cost.seconds / 1e9:8.1f}{cost.memory / MIB:8.0f}"
            print(f"{line}{cost.held / MIB:9.0f}", flush=True)
    fitted = exponents(costs, along)
    faster = _hardware(asked, points[0].config("auto", *words))
    for name, sizes in LARGE.items():
        print(f"\n{name}, {sizes.sequences} sequences of {sizes.length} tokens")
        print(f"  {'':<22}{'operations':>11}{'s':>11}   from       to")
        counts = laws.operations(sizes)
        counts["all"] = sum(counts.values())
        for stage, found in laws.predicted(fitted, sizes, faster).items():
            line = f"  {stage:<22}{counts[stage]:11.2e}{found.seconds:11.3g}"
            print(f"{line}   {found.least:<8.2g} {found.most:.2g}")


@dataclass(frozen=True)
class Timed(Wrapper):
    """A solver whose seconds are kept: those of a record are wall time."""

    task: Task = field(compare=False, repr=False)
    seconds: list[float] = field(compare=False, repr=False)

    def __call__(self, weight: Tensor, hessian: Tensor, **extra: Any) -> Solution:
        solutions: list[Solution] = []
        work = partial(self.base, weight, hessian, **extra)
        self.seconds.append(spent(self.task, lambda: solutions.append(work())))
        return solutions[0]


def measured(sizes: Sizes, words: Sequence[str]) -> dict[str, Cost]:
    """The costs of each stage on a random model of these sizes.

    The forward pass is a walk on which nothing else is done, Hessians are measured on a second
    walk. Solving is a part of a job of the method, and `write` is the rest of this job, of which
    the forward pass and the Hessians are subtracted. Memory of both is that of the job.
    """
    shared = ["model.dtype=float32", f"weight.group_size={sizes.group}"]
    shared += [f"eval.held_out.limit={sizes.sequences}", f"eval.held_out.length={sizes.length}"]
    cfg = sizes.config("auto", *shared, *words)
    task, batches = loaded(cfg)
    method, evaluator = instantiate(cfg.method), instantiate(cfg.eval.held_out)
    if not isinstance(method, Blockwise):
        raise UserError("method: bench scaling counts the operations of GPTQ; give method=gptq")
    seconds, memory = dict[str, float](), dict[str, float]()
    moments, solved, records = list[float](), list[float](), list[Record]()
    method = replace(method, solver=Timed(method.solver, task, solved))

    def walked(on_inputs: OnInputs) -> None:
        for block in walk(task, batches):
            block.advance(on_inputs)

    def measure(_: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        moments.append(spent(task, lambda: second_moment(inputs)))

    stages: dict[str, Callable[[], object]] = {
        "forward": lambda: walked(lambda names, inputs: None),
        "Hessian": lambda: walked(measure),
        "solve": lambda: records.extend(method(task, lambda: batches)),
        "pack": lambda: [Shelved.of(_whole(record), disk=False) for record in records],
        "evaluation": lambda: evaluator(task),
    }
    for name, work in stages.items():
        gc.collect()  # the model before is part of a circle
        heap.trim()
        before = resident(task)
        peak(task)  # from here on
        seconds[name] = spent(task, work)
        memory[name] = max(peak(task) - before, MIB)
    job, seconds["Hessian"], seconds["solve"] = seconds["solve"], sum(moments), sum(solved)
    seconds["write"] = job - sum(seconds[name] for name in ("forward", "Hessian", "solve"))
    memory["write"] = memory["solve"]
    counts, held = laws.operations(sizes), laws.numbers(sizes, evaluator.batch_tokens)
    return {
        name: Cost(counts[name], max(seconds[name], 1e-6), memory[name], 4 * held[name])
        for name in STAGES
    }


def _whole(record: Record) -> Packed:
    return record.packed.whole() if isinstance(record.packed, Shelved) else record.packed


def exponents(costs: Costs, along: Mapping[str, Sequence[Sizes]]) -> dict[str, Law]:
    """Prints the exponents of seconds in operations, and of operations, seconds and memory in each
    size; the laws of seconds in operations, by stage. A size that is not varied has none."""
    print(f"\n{'exponents':<12}{'s in operations':>17}   operations, seconds, memory in")
    print(f"{'':<29}" + "".join(f"{axis:>20}" for axis in along))
    fitted = {}
    for stage in STAGES:
        own = [each[stage] for each in costs.values()]
        fitted[stage] = laws.fit([c.operations for c in own], [c.seconds for c in own])
        error = math.expm1(fitted[stage].deviation)
        line = f"{stage:<12}{fitted[stage].exponent:9.2f} ± {error:4.0%} "
        for axis, points in along.items():
            sizes = [getattr(point, AXES[axis]) for point in points]
            found = [costs[point][stage] for point in points]
            line += "  "
            for key in ("operations", "seconds", "memory"):
                values = [getattr(cost, key) for cost in found]
                varied = len(set(sizes)) > 1
                line += f"{laws.fit(sizes, values).exponent:6.2f}" if varied else f"{'-':>6}"
        print(line)
    return fitted


def _hardware(asked: Scaling, cfg: DictConfig) -> dict[str, float]:
    """Prints the rates of products here and of the hardware of the prediction; their ratio, by
    stage."""
    task, _ = loaded(cfg)
    rates = products(task, max(asked.widths))
    dtype = str(cfg.model.dtype)
    here = {"rate": rates[f"{dtype} rate"], "rate32": rates["float32 rate"]}
    there = {key: getattr(asked, key) or here[key] for key in here}
    for place, own in (("here", here), ("in the prediction", there)):
        print(
            f"products {place}: {own['rate']:.2g} operations/s in the model's dtype, "
            f"{own['rate32']:.2g} in float32"
        )
    ratios = {key: there[key] / here[key] for key in here}
    return {stage: ratios["rate" if stage in NARROW else "rate32"] for stage in STAGES}
