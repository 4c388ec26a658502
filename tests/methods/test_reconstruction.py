"""Reconstruction by units: identities of AutoRound, AdaRound, AdaQuant, BRECQ and ZeroQuant."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import batches, data_dir, task_of
from helpers.pipeline import PPL, run
from helpers.problems import loss, problem
from helpers.training import same, weights
from hydra import compose
from safetensors.torch import load_file
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid
from qexp.methods.block_phase import BlockPhase
from qexp.methods.journal import Journal
from qexp.methods.output_importance import output_importance
from qexp.methods.output_moments import OutputMoments
from qexp.methods.reconstruction import Reconstruction
from qexp.methods.units import EachLinear, Objective, OneLinear, WholeBlock, WholeBlocks
from qexp.packed import weights_file
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.rounding_rules import AdaRound, SignRound
from qexp.quantizers.rounding_variable import Shifted, Soft
from qexp.quantizers.scale_rules import LSQ, Dynamic, ScaleRule
from qexp.quantizers.scheme import QuantizedActivations, quantize_activations
from qexp.training.optimizer import AdamW, Optimizer, SignSGD
from qexp.training.rounding_penalty import RoundingPenalty
from qexp.walk import Block, walk

pytestmark = pytest.mark.usefixtures("configured", "own_cache")

GRID = IntGrid(3, group_size=32, scale_dtype="float16")
METHODS = ("auto_round", "adaround", "brecq", "adaquant", "zeroquant")
ROUNDING = AdamW(
    weights=None, scales=None, offsets=None, rounding=1e-2, warmup=0.0, floor=1.0, clip=None
)
COARSE = QuantizedActivations(LinearInputs(), IntGrid(3, symmetric=True), dynamic=True)


def method(name: str, steps: int, *more: str) -> Reconstruction:
    grid = ["weight.bits=3", "weight.group_size=32"]
    overrides = [f"method={name}", f"method.blocks.steps={steps}", *grid, *more]
    return instantiate(compose("config", overrides).method)


def phase(scale: ScaleRule, optimizer: Optimizer, steps: int, **fields) -> BlockPhase:
    grid = fields.pop("grid", GRID)
    fields = {"epochs": None, "unit": "linear"} | fields
    return BlockPhase(grid, FakeQuantize(), scale, optimizer, steps=steps, **fields)


def one_linear(weight: Tensor, hessian: Tensor) -> OneLinear:
    """A unit whose inputs have not moved, without a bias."""
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight.clone()
    own = nn.functional.pad(hessian, (0, 1, 0, 1))
    zeros = torch.zeros_like(own)
    return OneLinear("linear", "linear", linear, OutputMoments(own, zeros, zeros))


def solved(rule: BlockPhase, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The quantized weight and its codes."""
    unit = one_linear(weight, hessian)
    rule._train(unit, 0)
    [record] = unit.records(rule.weight, 0.0)
    assert torch.equal(record.packed.dequantize(), unit.linear.weight)
    return unit.linear.weight.detach(), record.packed.codes


@pytest.mark.parametrize("name", METHODS)
def test_no_step_is_round_to_nearest(name: str) -> None:
    task, start = task_of(), task_of()
    step = method(name, 0)
    records = step(task, lambda: batches("llama"))
    floats = start.linears()
    for record, (own, linear) in zip(records, task.linears().items(), strict=True):
        assert record.name == own
        assert torch.equal(linear.weight, step.blocks.weight(floats[own].weight.detach()))
        if step.blocks.unit == "linear":
            assert record.error == pytest.approx(record.error_before, rel=1e-5)
    rounded = {f"model.{name}.weight" for name in floats}
    others = [{k: t for k, t in weights(t_).items() if k not in rounded} for t_ in (task, start)]
    assert same(*others)


@pytest.mark.parametrize("name", METHODS)
def test_solves_every_linear_and_comes_back(name: str, tmp_path: Path) -> None:
    task = task_of("opt" if name == "adaquant" else "llama")  # OPT's linears have biases
    records = method(name, 3)(task, lambda: batches("opt" if name == "adaquant" else "llama"))
    assert [record.name for record in records] == list(task.linears())
    weights_file.save(tmp_path, {record.name: record.packed for record in records}, {})
    packed, _ = weights_file.load(tmp_path)
    for record in records:
        assert torch.equal(
            packed[record.name].dequantize(), task.model.get_submodule(record.name).weight
        )
        assert record.bits == 3 + (16 + 3) / 32 == packed[record.name].bits()
    assert not any(".parametrizations." in name for name in task.state_dict())


def test_a_run_reloads_to_the_same_number_with_its_activation_quantizers(tmp_path: Path) -> None:
    steps = ["method=auto_round", "method.blocks.steps=4", "method.blocks.sequences=2"]
    first = run(tmp_path / "first", *steps, "activation=int8_tensor", "model=tiny_llama")
    assert first["weight/bits"] == 4 + (16 + 4) / 32
    text = (tmp_path / "first" / "training_blocks.csv").read_text()
    assert "step" in text and "flipped" in text
    reload = ["model=from_run", f"run={tmp_path / 'first'}"]
    assert run(tmp_path / "again", *reload, small=["progress=false"])[PPL] == first[PPL]


@pytest.mark.parametrize("unit", ["linear", "block"])
def test_it_goes_on_where_it_was_killed(unit: str, tmp_path: Path, monkeypatch) -> None:
    data, rule = batches("llama"), phase(LSQ("range", True), AdamW(1e-3), 2, unit=unit)

    def trained(name: str, index: int | None = None) -> tuple[dict[str, Tensor], str]:
        task, plain = task_of(folder=tmp_path / name), BlockPhase._finish
        (tmp_path / name).mkdir(exist_ok=True)

        def finish(self: BlockPhase, block: Block, units: object) -> object:
            if block.index == index:
                raise KeyError("killed")
            seen.append(block.index)
            return plain(self, block, units)

        with monkeypatch.context() as patch:
            patch.setattr(BlockPhase, "_finish", finish)
            rule(task, data, Journal({"name": name}))
        return weights(task), (tmp_path / name / "training_blocks.csv").read_text()

    seen: list[int] = []
    whole = trained("whole")
    with pytest.raises(KeyError, match="killed"):
        trained("killed", 1)
    seen.clear()
    again = trained("killed")
    assert seen == [1, 2] and same(again[0], whole[0]) and again[1] == whole[1]


# ---- SignRound


def correlated() -> tuple[Tensor, Tensor]:
    """Inputs with a few strong directions. Where all are alike, sign descent is worse than rounding
    to nearest: no gradient is small enough to leave a weight where it is."""
    weight, _ = problem()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 96, generator=generator)
    x += 0.05 * torch.randn(x.shape, generator=generator)
    return weight, 2 / len(x) * x.T @ x


def test_a_rounding_variable_moves_a_code_by_one_at_most() -> None:
    weight, hessian = correlated()
    unit = one_linear(weight, hessian)
    kept: list[Shifted] = []
    made = SignRound.__call__

    def keep(self: SignRound, *rest: object) -> Shifted:
        kept.append(made(self, *rest))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SignRound, "__call__", keep)
        phase(SignRound(), SignSGD(ranges=0.0), 200)._train(unit, 0)
    [fake] = kept
    assert 0.3 < float(fake.rounding.detach().abs().max()) <= 0.5025 + 1e-5
    assert fake.low.eq(1).all() and fake.high.eq(1).all()
    nearest = GRID.scales_of(weight)
    codes = GRID.encode(weight.reshape(-1, 32), nearest.map(lambda part: part.reshape(-1, 1)))
    [record] = unit.records(GRID, 0.0)
    change = record.packed.codes - codes.reshape(weight.shape).int()
    assert change.abs().max() == 1 and change.ne(0).double().mean() > 0.05
    assert record.error < 0.7 * record.error_before


def test_ranges_shrink_and_never_grow() -> None:
    weight, hessian = problem()
    frozen, _ = solved(phase(SignRound(), SignSGD(rounding=0.0, ranges=0.0), 20), weight, hessian)
    assert torch.equal(frozen, GRID(weight))
    ranges = phase(SignRound(), SignSGD(rounding=0.0), 50, keep="best")
    clipped, _ = solved(ranges, weight, hessian)
    assert loss(clipped - weight, hessian) < 0.99 * loss(frozen - weight, hessian)
    groups = weight.reshape(-1, 32)
    highest = clipped.reshape(-1, 32).amax(1)
    step = GRID.fit(groups).scale[:, 0]
    assert (highest <= groups.amax(1).clamp(min=0) + step / 2 + 1e-3).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_trained_range_has_the_gradient_of_its_ends(symmetric: bool) -> None:
    """A clipped weight is the end itself, up to the rounding of the zero point."""
    grid = IntGrid(4, symmetric=symmetric, scale_dtype="float32")
    weight = torch.tensor([[-1.0, -0.6, 0.2, 1.0]])
    fake = Shifted(grid, FakeQuantize(), weight)
    with torch.no_grad():
        fake.low.fill_(0.5)
        fake.high.fill_(0.5)
    fake(weight)[0, 0].backward()
    gradients = [float(part.grad) for part in (fake.low, fake.high)]
    if symmetric:  # the lowest of 16 codes is 16/15 of the bound, to which both ends belong
        assert sum(gradients) == pytest.approx(-16 / 15)
    else:
        assert gradients == pytest.approx([-1.0, 0.0], abs=0.5 / 15)


def test_the_best_step_is_never_worse_than_rounding_to_nearest() -> None:
    """With a rate that spoils the last step."""
    weight, hessian = problem()
    rough = SignSGD(rounding=40.0, ranges=40.0)
    errors = []
    for keep in ("best", "last"):
        made, _ = solved(phase(SignRound(), rough, 3, keep=keep), weight, hessian)
        errors.append(loss(made - weight, hessian))
    nearest = loss(GRID(weight) - weight, hessian)
    assert errors[0] <= nearest < errors[1]


GOLDEN = (data_dir() or Path(".")).parent / "golden"


@pytest.mark.skipif(not (GOLDEN / "autoround.safetensors").exists(), reason="no golden outputs")
@pytest.mark.parametrize("bits", [2, 3])
def test_parity_of_autorounds_error(bits: int) -> None:
    layer = load_file(GOLDEN / "attention_q.safetensors")
    reference = load_file(GOLDEN / "autoround.safetensors")[f"autoround.w{bits}.asym.g64"]
    weight, hessian = layer["weight"], layer["hessian"]
    grid = IntGrid(bits, group_size=64, scale_dtype="float16")
    ours, _ = solved(phase(SignRound(), SignSGD(), 200, grid=grid, keep="best"), weight, hessian)
    theirs = loss(reference.float() - weight, hessian)
    assert loss(ours - weight, hessian) <= 1.05 * theirs


# ---- AdaRound


def test_soft_rounding_starts_at_the_clamped_weight_and_ends_at_a_neighbour() -> None:
    weight, _ = problem()
    grid = IntGrid(3, group_size=32, scale_dtype="float32")
    q = grid.scales_of(weight)
    narrow = q._replace(scale=q.scale * 0.7, fitted=None)  # so that some are clipped
    fake = Soft(grid, weight)
    fake.scale = narrow.scale
    v, flat = fake._position(weight)
    fake.rounding.data = torch.logit(((v - v.floor()).reshape(weight.shape) + 0.1) / 1.2)
    clamped = grid.clip(weight.reshape(-1, 32), flat).reshape(weight.shape)
    assert not torch.equal(clamped, weight)
    torch.testing.assert_close(fake.train()(weight), clamped, rtol=0, atol=1e-4)
    fake.rounding.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    coded = fake.coded(weight)
    up = fake.rounding.ge(0).reshape(v.shape)
    expected = (v.floor() + up).clamp(0, grid.top).reshape(weight.shape)
    assert torch.equal(coded.codes, expected.int())
    assert torch.equal(fake.eval()(weight), coded.dequantize())


def test_adaround_decides_between_two_codes_and_lowers_the_error() -> None:
    weight, hessian = problem()
    rule = phase(AdaRound(), ROUNDING, 300, penalty=RoundingPenalty(weight=100.0, relative=True))
    made, codes = solved(rule, weight, hessian)
    q = GRID.scales_of(weight).map(lambda part: part.reshape(-1, 1))
    v = GRID.position(weight.reshape(-1, 32), q._replace(fitted=None)).reshape(weight.shape)
    assert ((codes == v.floor().clamp(0, 7)) | (codes == v.ceil().clamp(0, 7))).all()
    error, nearest = (loss(each - weight, hessian) for each in (made, GRID(weight)))
    assert error < 0.6 * nearest


def test_the_penalty_counts_undecided_weights_at_a_large_exponent() -> None:
    penalty = RoundingPenalty(weight=0.01, beta=[1e4, 2.0], warmup=0.0)
    variables = torch.tensor([[-9.0, 9.0, 0.0, 0.5]])
    assert float(penalty([variables], 0, 10)) == pytest.approx(0.02)


def test_the_exponent_follows_its_schedule() -> None:
    assert RoundingPenalty().beta_at(8000, 10000) == pytest.approx(4.636, abs=1e-3)
    assert RoundingPenalty(anneal="linear").beta_at(8000, 10000) == pytest.approx(6.5)
    assert RoundingPenalty().beta_at(2000, 10000) == 20
    assert RoundingPenalty()([torch.zeros(1, 1)], 1999, 10000) == 0


# ---- units


@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_of_moments_is_the_mean_square_of_outputs(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, moved = (torch.randn(2, 30, 12, generator=generator) for _ in range(2))
    moved = x + 0.1 * moved
    linear = nn.Linear(12, 5, bias=biased)
    exact = linear(x).detach()
    unit = OneLinear("one", "one", linear, OutputMoments.of([moved[:1], moved[1:]], [x[:1], x[1:]]))
    torch.testing.assert_close(unit.loss(0), (linear(moved) - exact).square().mean())
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.testing.assert_close(unit.loss(0), (linear(moved) - exact).square().mean())


@pytest.mark.parametrize("kind", [EachLinear, lambda floats: WholeBlocks(floats, Objective())])
def test_units_with_float_inputs_do_not_depend_on_blocks_before(kind: Callable) -> None:
    data, found = batches("llama"), []
    rule = phase(LSQ("range", True), AdamW(1e-3, 1e-3, 1e-3, clip=None), 3)
    for skipped in ((), (0, 1)):
        task, units = task_of(), kind(True)

        def train(unit: object) -> None:
            rule._train(unit, 0)
            unit.records(GRID, 0.0)

        for block in walk(task, data, 2):
            units.observe(block)
            if block.index not in skipped:
                units(block, train)
        found.append(weights(task.blocks[2]))
    assert same(*found)


def test_errors_of_a_block_weigh_by_the_gradient_of_the_models_divergence() -> None:
    task, data = task_of(), batches("llama", 1)
    *_, last = walk(task, data, 2)
    exact = next(iter(last.outputs()))
    equal = output_importance(last, 0, exact, exact)
    torch.testing.assert_close(equal, torch.ones_like(exact), rtol=0, atol=1e-5)
    entry = (exact + 0.3).requires_grad_()
    head = nn.Sequential(
        task.model.get_submodule(task.arch.norm), task.model.get_submodule(task.arch.head)
    )
    own, other = (head(each).log_softmax(-1) for each in (entry, exact))
    (other.exp() * (other - own)).sum().backward()
    expected = (entry.grad.abs() + 1).square()
    assert expected.max() > 1.02
    found = output_importance(last, 0, entry.detach(), exact)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    unit = WholeBlock(last, [exact + 1], [exact], Objective())
    plain = unit.loss(0)
    unit.weights = [torch.ones_like(exact)]
    assert unit.loss(0) == plain


def test_blocks_read_rounded_activations_and_aim_at_float_ones() -> None:
    task, plain, data = task_of(), task_of(), batches("llama", 1)
    quantize_activations(task, [COARSE], lambda: data)
    units, reference = WholeBlocks(False, Objective()), list(walk(plain, data, 2))
    losses = []
    for block, float_block in zip(walk(task, data, 2), walk(task_of(), data, 2), strict=True):
        units.observe(block)
        [exact] = float_block.outputs()
        torch.testing.assert_close(units._exact[0], exact)
        units(block, lambda unit: losses.append(float(unit.loss(0).detach())))
    assert len(reference) == len(losses) and min(losses) > 1e-4


def test_the_end_phase_keeps_the_activation_quantizers_that_blocks_trained_with() -> None:
    more = ["trainer.steps=1", "trainer.sequences=1", "activation=int8_tensor"]
    overrides = ["method=efficient_qat", "weight.group_size=32", *more]
    task = task_of()
    step = instantiate(compose("config", [*overrides, "method.activations_first=true"]).method)
    records = step(task, lambda: batches("llama", 1))
    assert len(records) == len(task.linears())
    assert len(task.quantizers) == len(task.blocks) * len(task.arch.groups)
    assert all(q.enabled and not list(q.parameters()) for q in task.quantizers.values())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=auto_round", "method.blocks.epochs=1"], r"^method\.blocks\.steps=200: .* null"),
        (["method=efficient_qat", "method.blocks.epochs=null"], r"^method\.blocks\.steps=None"),
        (["method=auto_round", "weight=nf4"], r"^method\.blocks\.scale=SignRound: .*weight=int"),
        (
            ["method=adaround", "method/scale@method.blocks.scale=lsq_plus"],
            r"^method\.blocks\.penalty: LSQ has no rounding",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        instantiate(compose("config", overrides).method)


def test_an_optimizer_that_trains_nothing_is_refused() -> None:
    rule = phase(Dynamic(), SignSGD(), 1)
    with pytest.raises(UserError, match=r"^method\.blocks\.optimizer: SignSGD has a rate for"):
        rule(task_of(), batches("llama", 1), Journal({}))
