"""Rounding targets: asymmetric calibration as the usual problem with another matrix, and GPTAQ."""

import pytest
import torch
from helpers.problems import loss
from helpers.reference.obq import obq
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.solvers import GPTQ
from qexp.solvers.base import Moments
from qexp.solvers.rtn import RTN
from qexp.solvers.target import Asymmetric, Same, shift

GRID = IntGrid(3)


def streams(seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of the float model and of a model whose earlier layers are rounded."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator)
    x = torch.randn(tokens, 24, generator=generator) @ mixing
    moved = x + 0.5 * torch.randn(x.shape, generator=generator)
    return torch.randn(12, 24, generator=generator), x, moved


def moments(x: Tensor, moved: Tensor) -> Moments:
    return Moments(2 / len(x) * moved.T @ moved, 2 / len(x) * x.T @ moved)


def test_the_output_error_is_the_objective_at_the_target_up_to_a_constant() -> None:
    weight, x, moved = streams()
    both = moments(x, moved)
    target = Asymmetric(damp=0.0)(weight, both)
    constants = []
    for seed in range(3):
        other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        output = 2 / len(x) * (moved @ other.T - x @ weight.T).square().sum()
        constants.append(float(output) - loss(other - target, both.own))
    assert constants[0] > 0
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-3)


def test_off_is_the_weight_itself() -> None:
    weight, x, moved = streams()
    assert Same()(weight, None) is weight
    assert Asymmetric(alpha=0.0)(weight, None) is weight
    torch.testing.assert_close(Asymmetric()(weight, moments(x, x)), weight, rtol=1e-4, atol=1e-4)
    heavy = Asymmetric(damp=1e8)(weight, moments(x, moved))
    torch.testing.assert_close(heavy, weight, rtol=1e-4, atol=1e-4)


def test_alpha_is_a_share_of_the_shift() -> None:
    weight, x, moved = streams()
    both = moments(x, moved)
    whole, half = (Asymmetric(alpha=alpha)(weight, both) - weight for alpha in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_always_zero_shifts_nothing() -> None:
    weight, x, moved = streams()
    moved[:, 5] = 0
    both = moments(x, moved)
    assert shift(weight, both, 0.01)[:, 5].eq(0).all()
    assert shift(weight, both, 0.0).isfinite().all()


def test_gptaq_is_gptq_where_nothing_has_moved_or_nothing_is_carried() -> None:
    weight, x, moved = streams()
    same, both = moments(x, x), moments(x, moved)
    plain = GPTQ(GRID)(weight, same.own).weight
    assert torch.equal(GPTQ(GRID, carry=1.0)(weight, same.own, same).weight, plain)
    assert torch.equal(
        GPTQ(GRID)(weight, both.own, both).weight, GPTQ(GRID)(weight, both.own).weight
    )


def test_the_carried_matrix_solves_for_the_later_columns() -> None:
    """Its row q is carry · D[q, >q] (H[>q, >q])⁻¹ (the paper's closed form)."""
    weight, x, moved = streams()
    both = moments(x, moved)
    seen: list[Tensor] = []

    class Grid(IntGrid):
        """Rounds nothing, so that columns hold what was carried to them."""

        def round(self, x, q, rounding=torch.round, clamp=torch.clamp):
            return x

        def encode(self, x, q, rounding=torch.round, clamp=torch.clamp):
            seen.append(x)
            return super().encode(x, q, rounding, clamp)

    GPTQ(Grid(3), damp=0.0, carry=0.5)(weight, both.own, both)
    [final] = [each for each in seen if each.shape == weight.shape]
    expected, moves = weight.clone().double(), (both.cross - both.own).double()
    for q in range(weight.shape[1] - 1):
        inverse = both.own.double()[q + 1 :, q + 1 :].inverse()
        row = 0.5 * moves[q, q + 1 :] @ inverse
        expected[:, q + 1 :] += expected[:, q : q + 1] * row
    torch.testing.assert_close(final.double(), expected, rtol=1e-3, atol=1e-3)


FIRST = Asymmetric(first_column=True)


def qronos(weight: Tensor, both: Moments, **fields) -> Tensor:
    return GPTQ(GRID, **fields)(
        FIRST(weight, both), both.own, first=FIRST.first(weight, both)
    ).weight


def test_qronos_is_its_own_derivation() -> None:
    """The first column as in the paper, the others solved again and rounded by OBQ's equations."""
    weight, x, moved = streams()
    both = moments(x, moved)
    own, cross, w = both.own.double(), both.cross.double(), weight.double()
    q = GRID.fit(FIRST(weight, both))

    def nearest(values: Tensor, _: int) -> Tensor:
        return GRID.round(values.float()[:, None], q)[:, 0].double()

    first = nearest((w @ cross[:, 0] - w @ own.triu(1)[0]) / own[0, 0], 0)
    lam = FIRST.damp * own.diagonal().mean() * torch.eye(len(own))
    products = (w @ (cross + lam))[:, 1:] - first[:, None] * own[0, 1:]
    later = (own + lam)[1:, 1:]
    rest = obq(products @ later.inverse(), later, 0.0, nearest)
    expected = torch.cat([first[:, None], rest], 1)
    ours = qronos(weight, both, damp=FIRST.damp)
    assert torch.equal(ours[:, 0], first.float())
    assert (ours - expected).abs().lt(1e-5).double().mean() > 0.99
    plain = GPTQ(GRID)(FIRST(weight, both), both.own).weight
    assert not torch.equal(plain[:, 0], ours[:, 0])


def test_the_first_column_of_the_sweep_is_the_one_that_comes_first() -> None:
    weight, x, moved = streams()
    both = moments(x, moved)
    column = int(both.own.diagonal().argmax())
    ours = qronos(weight, both, act_order=True, static_groups=True)
    q = GRID.fit(FIRST(weight, both))
    values = FIRST.first(weight, both)[:, column : column + 1]
    assert torch.equal(ours[:, column : column + 1], GRID.round(values, q))


def test_qronos_is_gptq_where_nothing_has_moved() -> None:
    weight, x, _ = streams()
    same = moments(x, x)
    plain = GPTQ(GRID)(weight, same.own).weight
    assert (qronos(weight, same) - plain).abs().lt(1e-4).double().mean() > 0.99
    moved = streams()[2]
    moved[:, 0] = 0
    both = moments(x, moved)
    assert FIRST.first(weight, both)[:, 0].eq(0).all() and qronos(weight, both)[:, 0].eq(0).all()


def test_without_a_share_or_the_rule_nothing_is_given() -> None:
    weight, x, moved = streams()
    both = moments(x, moved)
    assert Same().first(weight, both) is None
    assert Asymmetric().first(weight, both) is None
    assert Asymmetric(alpha=0.0, first_column=True).first(weight, both) is None


def test_the_order_of_output_errors_on_random_layers() -> None:
    """The mean over layers: W* ≤ 1.02 Qronos, < GPTAQ at 1 < GPTAQ at 0.25 < GPTQ < RTN."""
    totals = torch.zeros(6)
    for seed in range(50):
        weight, x, moved = streams(seed)
        both = moments(x, moved)
        target = Asymmetric()(weight, both)
        found = [
            GPTQ(GRID)(target, both.own).weight,
            qronos(weight, both),
            GPTQ(GRID, carry=1.0)(weight, both.own, both).weight,
            GPTQ(GRID, carry=0.25)(weight, both.own, both).weight,
            GPTQ(GRID)(weight, both.own).weight,
            RTN(GRID)(weight).weight,
        ]
        scale = float((x @ weight.T).square().sum())
        totals += (
            torch.tensor([float((moved @ q.T - x @ weight.T).square().sum()) for q in found])
            / scale
        )
    plain, first, *others = totals.tolist()
    assert plain <= 1.02 * first
    assert [first, *others] == sorted([first, *others])


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"alpha": -0.1}, {"damp": -1.0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"method.target.{next(iter(wrong))}"):
        Asymmetric(**wrong)
