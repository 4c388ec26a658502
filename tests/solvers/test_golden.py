"""Parity with the reference implementations on a real layer (golden/README.md says how made)."""

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import pytest
import torch
from helpers.models import data_dir
from helpers.problems import loss
from safetensors.torch import load_file
from torch import Tensor, nn

from qexp.grid import Grid, IntGrid, Range
from qexp.grid.base import Interval
from qexp.grid.half_quadratic import HalfQuadratic
from qexp.grid.least_error import least_error, multiples
from qexp.grid.range_search import Around, WidthAndZero
from qexp.grid.ranges import MSE, RMS, MinMax
from qexp.packed.coded import Coded
from qexp.packed.mixed import Partial
from qexp.packed.parts import Parts
from qexp.packed.table import Table
from qexp.solvers import GPTQ, LNQ, RTN, BiLLM, Solver, SpQR, SqueezeLLM
from qexp.solvers.base import Moments
from qexp.solvers.factor import inverse_factor
from qexp.solvers.groupwise import MixedGroups
from qexp.solvers.owq import OWQ
from qexp.solvers.pbllm import PBLLM
from qexp.solvers.quip import QuIP
from qexp.solvers.sparse import SparseGPT
from qexp.transforms.clip import clipped

FOLDER = data_dir()
FILE = (FOLDER or Path(".")).parent / "golden" / "attention_q.safetensors"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="no golden outputs on this machine")


def two_levels(bits: int, size: int, second: bool = True) -> IntGrid:
    level = IntGrid(3, group_size=16, include_zero=False, real_zero=True) if second else None
    return IntGrid(
        bits, group_size=size, include_zero=False, real_zero=True, scales=level, zeros=level
    )


SOLVERS: dict[str, Solver] = {
    "gptq.w4.asym": GPTQ(IntGrid(4)),
    "gptq.w3.sym": GPTQ(IntGrid(3, symmetric=True)),
    "gptq.w3.g64": GPTQ(IntGrid(3, group_size=64)),
    "gptq.w2.g64.act": GPTQ(IntGrid(2, group_size=64), act_order=True, static_groups=True),
    "gptq.w4.act": GPTQ(IntGrid(4), act_order=True),
    "spqr.w4.g16": SpQR(two_levels(4, 16), threshold=0.2, damp=1.0),
    "spqr.w2.g64": SpQR(two_levels(2, 64), threshold=2.0, act_order=True),
    "spqr.w3.g32.noout": SpQR(two_levels(3, 32, second=False), threshold=inf),
    "billm": BiLLM(),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.mark.parametrize("key", SOLVERS)
def test_parity(golden: dict[str, Tensor], key: str) -> None:
    weight, hessian, reference = golden["weight"], golden["hessian"], golden[key]
    solution = SOLVERS[key](weight, hessian)
    ours, theirs = (loss(w - weight, hessian) for w in (solution.weight, reference))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert (solution.weight - reference).abs().lt(1e-5).double().mean() >= 0.99
    nearest = SOLVERS[key].baseline(weight, hessian).weight
    assert ours < loss(nearest - weight, hessian)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("key", SOLVERS)
def test_parity_on_an_accelerator(golden: dict[str, Tensor], key: str, accelerator) -> None:
    there = (golden[name].to(accelerator) for name in ("weight", "hessian"))
    ours = SOLVERS[key](*there).weight
    assert ours.device.type == accelerator.type
    assert same(ours.cpu(), golden[key], golden) >= 0.99


@pytest.mark.parametrize("key", [key for key in SOLVERS if key.startswith("spqr")])
def test_outliers_are_those_of_the_reference(golden: dict[str, Tensor], key: str) -> None:
    packed = SOLVERS[key](golden["weight"], golden["hessian"]).packed
    assert isinstance(packed, Coded)
    found = torch.zeros_like(golden["weight"])
    if packed.outliers is not None:
        found = packed.outliers.put(found)
    reference = golden[f"{key}.outliers"].bool()
    assert int((found.ne(0) != reference).sum()) <= 0.02 * int(reference.sum())


def of_file(name: str) -> dict[str, Tensor]:
    """What another method's reference returned for the same layer."""
    path = FILE.with_name(name)
    if not path.exists():
        pytest.skip(f"no {name} on this machine")
    return load_file(path)


def same(ours: Tensor, theirs: Tensor, golden: dict[str, Tensor], near: float = 1e-5) -> float:
    """The share of equal weights, after a check that both err as much to 0.1 %."""
    weight, hessian = golden["weight"], golden["hessian"]
    errors = (loss(each - weight, hessian) for each in (ours, theirs))
    assert next(errors) == pytest.approx(next(errors), rel=1e-3)
    return float((ours - theirs).abs().lt(near).double().mean())


# The reference takes the means of a row over its salient weights too, as zeros.
PB = PBLLM(salient_as_zeros=True, salient_metric="magnitude")
PBLLMS = {
    "pbllm.magnitude.90": PB,
    "pbllm.hessian.90": replace(PB, salient_metric="hessian"),
    "pbllm.magnitude.70": replace(PB, salient=0.3),
    "pbllm.magnitude.90.rtn": replace(PB, feedback=False),
}


@pytest.mark.parametrize("key", PBLLMS)
def test_parity_of_pbllm(golden: dict[str, Tensor], key: str) -> None:
    reference = of_file("pbllm.safetensors")
    solution = PBLLMS[key](golden["weight"], golden["hessian"])
    assert isinstance(solution.packed, Partial)
    mask = solution.packed.salient == reference[f"{key}.salient"].bool()
    assert mask.double().mean() >= 0.999
    assert same(solution.weight, reference[key], golden) >= 0.99


@pytest.mark.parametrize("key", ["w4.g64", "w3.g64", "w2.g64", "w3.g96"])
def test_parity_of_hqq(golden: dict[str, Tensor], key: str) -> None:
    reference, size = of_file("hqq.safetensors"), int(key[4:])
    grid = IntGrid(
        int(key[1]),
        group_size=size,
        include_zero=False,
        real_zero=True,
        range=HalfQuadratic(),
    )
    coded = RTN(grid)(golden["weight"], golden["hessian"]).packed
    assert isinstance(coded, Coded)
    codes, zero = reference[f"hqq.{key}.codes"], reference[f"hqq.{key}.zero"]
    assert (coded.codes == codes).double().mean() >= 0.999
    torch.testing.assert_close(coded.scales().zero, zero, rtol=0, atol=1e-4)
    assert same(coded.dequantize(), reference[f"hqq.{key}"], golden) >= 0.99


MSE3 = IntGrid(3, range=MSE())
NARROW = IntGrid(3, symmetric=True, narrow=True, group_size=64, range=MSE())
GPTAQS = {
    "w4": GPTQ(IntGrid(4), carry=0.25),
    "w3": GPTQ(IntGrid(3), carry=0.25),
    "w3.alpha1": GPTQ(IntGrid(3), carry=1.0),
    "w3.mse": GPTQ(MSE3, carry=0.25),
    "w3.sym.g64.act": GPTQ(NARROW, carry=0.25, act_order=True, static_groups=True),
}


@pytest.mark.parametrize("key", GPTAQS)
def test_parity_of_gptaq(golden: dict[str, Tensor], key: str) -> None:
    reference, hessian = of_file("gptaq.safetensors"), golden["hessian"]
    moments = Moments(hessian, hessian + reference["cross"])
    ours = GPTAQS[key](golden["weight"], hessian, moments).weight
    assert same(ours, reference[f"gptaq.{key}"], golden) >= 0.99


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_parity_of_awqs_clipping(golden: dict[str, Tensor], bits: int) -> None:
    reference, key = of_file("awq_clip.safetensors"), f"awq.clip.w{bits}.g64"
    weight, grid = golden["weight"], IntGrid(bits, group_size=64)
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight
    ours = clipped(linear, golden["hessian"], grid, "one")
    ends = ours.reshape(len(weight), -1, 64).abs().amax(2)
    theirs = reference[f"{key}.max"].reshape(ends.shape)
    assert (ends - theirs).abs().lt(1e-5).double().mean() >= 0.99
    assert same(grid(ours), reference[key], golden) >= 0.99


@dataclass(frozen=True)
class Given(Range):
    """The intervals of scales and zero points that are known."""

    low: Tensor
    high: Tensor

    def __call__(self, x: Tensor, grid: Grid, counts: Tensor | None = None) -> Interval:
        return self.low, self.high


OWQS = {"w3.t3.01": 2, "w3.t3.1": 8, "w4.t4.01": 2}


@pytest.mark.parametrize("key", OWQS)
def test_parity_of_owq(golden: dict[str, Tensor], key: str) -> None:
    """On the reference's scales, which `test_parity_of_owqs_range_search` finds on some rows."""
    reference, bits = of_file("owq.safetensors"), int(key[1])
    scale, zero = (reference[f"owq.{key}.{each}"] for each in ("scale", "zero"))
    given = Given(-zero * scale, (2**bits - 1 - zero) * scale)
    base = GPTQ(IntGrid(bits, range=given), damp=0.0)
    solver = OWQ(base, columns=OWQS[key], weak_dtype="float32")
    ours = solver(golden["weight"], golden["hessian"])
    assert isinstance(ours.packed, Parts) and ours.packed.listed is not None
    assert ours.packed.listed.tolist() == reference[f"owq.{key}.columns"].sort().values.tolist()
    assert same(ours.weight, reference[f"owq.{key}"], golden) >= 0.99


def test_parity_of_owqs_range_search(golden: dict[str, Tensor]) -> None:
    reference, rows = of_file("owq.safetensors"), slice(0, 6)
    weight, hessian = golden["weight"][rows], golden["hessian"]
    others = torch.ones(weight.shape[1], dtype=torch.bool)
    others[reference["owq.w3.t3.1.columns"].long()] = False
    q = IntGrid(3, range=WidthAndZero()).fit(weight[:, others])
    torch.testing.assert_close(q.scale, reference["owq.w3.t3.1.scale"][rows])
    assert torch.equal(q.zero, reference["owq.w3.t3.1.zero"][rows])
    # With groups: 40 steps, and the last group of those that are left is shorter.
    columns = reference["owq.w3.t3.1.g64.columns"].long().sort().values
    grid = IntGrid(3, group_size=64, range=WidthAndZero(steps=40))
    solver = ListedOWQ(GPTQ(grid, damp=0.0, fit_every=128), columns=8, weak_dtype="float32")
    ours = replace(solver, known=columns)(weight, hessian).weight
    theirs = reference["owq.w3.t3.1.g64"][rows]
    assert (ours - theirs).abs().lt(1e-5).double().mean() >= 0.99


@dataclass(frozen=True)
class ListedOWQ(OWQ):
    """OWQ on some rows, with the columns that are weak in all rows."""

    known: Tensor | None = None

    def sensitivity(self, weight: Tensor, hessian: Tensor) -> Tensor:
        assert self.known is not None
        return torch.zeros(weight.shape[1]).index_fill_(0, self.known, 1.0)


SPARSE = SparseGPT(None, dtype="float32")
SPARSEGPTS = {
    # One weight more per block, as in the reference, except in its last, shorter block.
    "50": replace(SPARSE, sparsity=0.5 + 1 / 12288),
    "2of4": replace(SPARSE, pattern=[2, 4]),
    "50.w4": replace(SPARSE, grid=IntGrid(4), sparsity=0.5 + 1 / 12288),
    "2of4.w4": replace(SPARSE, grid=IntGrid(4), pattern=[2, 4]),
}


@pytest.mark.parametrize("key", SPARSEGPTS)
def test_parity_of_sparsegpt(golden: dict[str, Tensor], key: str) -> None:
    reference = of_file("sparsegpt.safetensors")
    ours = SPARSEGPTS[key](golden["weight"], golden["hessian"]).weight
    zeros = reference[f"sparsegpt.{key}.zeros"].bool()
    assert (ours.eq(0) == zeros).double().mean() >= 0.999
    assert same(ours, reference[f"sparsegpt.{key}"], golden, near=1e-4) >= 0.99


class Middle(Around):
    """`Around` with the middle code as zero point, a quirk of SliM-LLM's code."""

    def __call__(self, x: Tensor, grid: Grid, counts: Tensor | None = None) -> Interval:
        low, high = MinMax()(x, grid, counts)
        moves = [0.1 * step / 50 for step in range(51)]
        factors = [1 + move for move in moves] + [1 - move for move in moves[1:]]
        low = (low.clamp(max=0) - high.clamp(min=0)) * 2 ** (grid.bits - 1) / grid.top
        high = -low * (grid.top / 2 ** (grid.bits - 1) - 1)
        return least_error((low, high), multiples(factors), x, grid, counts, self.norm)


@dataclass(frozen=True)
class Quirky(MixedGroups):
    """Groups of two bits before the first one of more have the middle code as zero point."""

    def _grid(self, bits: int) -> IntGrid:
        grid = super()._grid(bits)
        return replace(grid, range=Middle()) if bits == 2 else grid


SLIMS = {
    "w2.g64": MixedGroups(IntGrid(2, group_size=64, range=Around()), centred=False),
    "w2.g128": MixedGroups(IntGrid(2, group_size=128, range=Around()), centred=False),
    "w3.g64": Quirky(IntGrid(3, group_size=64, range=Around())),  # only its first two have 2 bits
}


@pytest.mark.parametrize("key", SLIMS)
def test_parity_of_slim_llm(golden: dict[str, Tensor], key: str) -> None:
    """With the inputs that the reference drew, and what it adds to the Hessian."""
    reference, weight = of_file("slim_llm.safetensors"), golden["weight"]
    hessian = golden["hessian"] + 0.009999285452067852 * torch.eye(576)
    bits = int(key[1])

    @dataclass(frozen=True)
    class Seen(type(SLIMS[key])):
        def _drawn(self, hessian: Tensor) -> Tensor:
            return reference["inputs"]

        def _rounded(self, weight: Tensor, more: int) -> list[Tensor]:
            plain = MixedGroups(replace(self.grid, range=MinMax()), centred=self.centred)
            return plain._rounded(weight, more)

    solver = Seen(SLIMS[key].grid, metric="softmax_kl", least=1, centred=SLIMS[key].centred)
    salience = solver.salience(weight, inverse_factor(hessian, 0.0).upper)
    torch.testing.assert_close(salience, reference[f"slim.{key}.salience"], rtol=1e-4, atol=0)
    ours = solver(weight, hessian)
    assert isinstance(ours.packed, Parts) and ours.packed.choice is not None
    widths = ours.packed.choice + bits - 1
    assert widths.tolist() == reference[f"slim.{key}.bits"].tolist()
    assert same(ours.weight, reference[f"slim.{key}"], golden) >= 0.99


HALF = 2e-3  # the reference returns float16
LDLQ = {"backwards": True, "clip_first": True}
# The reference sorts ascending before it starts at the end.
SORTED = {"act_order": True, "clip_first": True, "greedy": 9}


@pytest.mark.parametrize("bits", [2, 4])
def test_parity_of_ldlq(golden: dict[str, Tensor], bits: int) -> None:
    reference = of_file("quip.safetensors")[f"quip.ldlq.w{bits}"].float()
    solver = QuIP(IntGrid(bits), damp=0.01, **LDLQ)
    ours = solver.solved(golden["weight"], golden["hessian"])[0].dequantize()
    assert same(ours, reference, golden, HALF) >= 0.99


def test_parity_of_greedy_passes(golden: dict[str, Tensor]) -> None:
    weight, hessian, kept = golden["weight"], golden["hessian"], of_file("quip.safetensors")
    theirs = {key: loss(kept[key].float() - weight, hessian) for key in kept if key.endswith("w3")}
    for key, settings in {"ldlqRG": SORTED, "allbal": SORTED | {"feedback": False}}.items():
        coded, _ = QuIP(IntGrid(3), damp=0.01, **settings).solved(weight, hessian)
        ours = coded.dequantize()
        assert loss(ours - weight, hessian) == pytest.approx(theirs[f"quip.{key}.w3"], rel=2e-3)
        assert (ours - kept[f"quip.{key}.w3"]).abs().lt(HALF).double().mean() >= 0.99


@pytest.mark.parametrize("key", ["ldlq.w4", "ldlq.w2", "ldlqRG.w2"])
def test_parity_of_quip(golden: dict[str, Tensor], key: str) -> None:
    """With the rotations that the reference drew, and its damping, which comes twice."""
    kept = of_file("quip.safetensors")
    weight, hessian, sort = golden["weight"], golden["hessian"], "RG" in key
    left, right, stretch = (kept[name].double() for name in ("U", "V", "scaleWH"))
    turned = (left @ (weight * stretch) @ right.T).float()
    scaled = hessian / stretch / stretch[:, None]
    scaled = scaled * (len(scaled) / scaled.trace()) + 0.01 * torch.eye(len(scaled))
    bits = int(key[-1])
    grid = IntGrid(bits, per_tensor=True, include_zero=False, real_zero=True, range=RMS())
    solver = QuIP(grid, damp=0.01, **(SORTED if sort else LDLQ))
    coded, _ = solver.solved(turned, (right @ scaled @ right.T).float())
    ours = (left.T @ coded.dequantize().double() @ right / stretch).float()
    theirs = kept[f"quip.incoh.{key}"].float()
    errors = [loss(each - weight, hessian) for each in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2 if sort else 5e-3)
    assert sort or (ours - theirs).abs().lt(HALF).double().mean() >= 0.99


def weighted_error(
    rounded: Tensor, golden: dict[str, Tensor], reference: dict[str, Tensor]
) -> float:
    return float((reference["sensitivity"] * (rounded - golden["weight"]).square()).sum())


# Σ F Δ² of the exact optimum, by a dynamic programme (golden/README.md).
OPTIMA = {"w4": 11.157, "w3": 56.759, "w3.sparse": 48.0}


@pytest.mark.parametrize("key", OPTIMA)
def test_squeezellm_is_between_the_optimum_and_the_reference(
    golden: dict[str, Tensor], key: str
) -> None:
    reference, weight = of_file("squeezellm.safetensors"), golden["weight"]
    solver, size = SqueezeLLM(int(key[1])), weight.numel()
    if key == "w3.sparse":
        # The reference takes one sensitive weight less than 0.05 %, and a threshold for the others.
        mask = reference["squeezellm.w3.sparse.outliers"].bool()
        solver = replace(solver, sensitive=26.5 / size, outliers=(float(mask.sum()) + 0.5) / size)
    solution = solver(weight, reference["sensitivity"])
    ours = weighted_error(solution.weight, golden, reference)
    assert OPTIMA[key] <= ours
    assert ours < weighted_error(reference[f"squeezellm.{key}"], golden, reference)
    nearest = solver.baseline(weight, golden["hessian"]).weight
    assert ours < weighted_error(nearest, golden, reference)
    if key == "w3.sparse":
        assert isinstance(solution.packed, Table) and solution.packed.outliers is not None
        found = solution.packed.outliers.put(torch.full_like(weight, torch.nan))
        assert torch.equal(found.isfinite(), mask)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_parity_of_lnq(golden: dict[str, Tensor], bits: int) -> None:
    """From the reference's own start, and from ours."""
    weight, hessian = golden["weight"][:64], golden["hessian"]
    reference = of_file("lnq.safetensors")
    start, key = of_file("squeezellm.safetensors"), f"squeezellm.w{bits}"
    if bits == 2:
        table, codes = (reference[f"lnq.w2.start_{part}"] for part in ("table", "codes"))
    else:
        table, codes = start[f"{key}.table"][:64].half().float(), start[f"{key}.codes"][:64]
    theirs = loss(reference[f"lnq.w{bits}"] - weight, hessian)
    codes, table = LNQ(bits).improved(weight, hessian, codes.long(), table)
    assert loss(table.gather(1, codes) - weight, hessian) < 1.01 * theirs
    solver = LNQ(bits)
    assert loss(solver(weight, hessian).weight - weight, hessian) < theirs
    assert theirs < loss(solver.baseline(weight, hessian).weight - weight, hessian)
