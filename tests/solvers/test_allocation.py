"""Rules of bit allocation: against brute force, their order, and budgets that nothing fits."""

import pytest
import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.solvers.allocation import DP, Lagrange, OverBudget, Rule, Uniform

RULES: tuple[Rule, ...] = (DP(), Lagrange(), Uniform())
BITS = torch.tensor([2, 3, 4, 6])


def tables(items: int, seed: int = 0, convex: bool = True) -> tuple[Tensor, Tensor]:
    """Costs that fall about fourfold with each bit, or at random; sizes of items of any length."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(items, 1, generator=generator).mul(6).exp()
    costs = scale * 4.0**-BITS * (1 + 0.3 * torch.rand(items, 4, generator=generator))
    if not convex:
        costs = torch.rand(items, 4, generator=generator)
    weights = torch.randint(50, 500, (items, 1), generator=generator)
    return costs, weights * BITS + torch.randint(20, (items, 4), generator=generator)


def total(table: Tensor, choice: list[int]) -> float:
    return float(table.double().gather(1, torch.tensor(choice)[:, None]).sum())


@pytest.mark.parametrize("seed", range(6))
def test_the_dynamic_programme_finds_what_brute_force_finds(seed: int) -> None:
    costs, sizes = tables(6, seed, convex=seed % 2 == 0)
    for share in (0.0, 0.2, 0.5, 0.9, 1.2):
        low, high = int(sizes.amin(1).sum()), int(sizes.amax(1).sum())
        budget = int(low + share * (high - low))
        every = torch.cartesian_prod(*[torch.arange(4)] * 6)
        paid, taken = (table.double()[torch.arange(6), every].sum(1) for table in (costs, sizes))
        best = float(paid[taken <= budget].min())
        found = DP()(costs, sizes, budget)
        assert total(sizes, found) <= budget
        assert total(costs, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_rules(seed: int) -> None:
    costs, sizes = tables(60, seed)
    for budget in (int(sizes[:, 1].sum()), int(sizes[:, 1].sum() * 1.2)):
        found = [rule(costs, sizes, budget) for rule in RULES]
        assert all(total(sizes, choice) <= budget for choice in found)
        dp, lagrange, uniform = (total(costs, choice) for choice in found)
        assert dp <= lagrange <= dp * 1.01
        assert lagrange < 0.8 * uniform


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equal_tables_get_equal_bits(rule: Rule) -> None:
    costs, sizes = (table[:1].expand(12, 4) for table in tables(1))
    for option in range(4):
        assert rule(costs, sizes, int(sizes[:, option].sum())) == [option] * 12


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_more_bits_never_cost_more(rule: Rule) -> None:
    costs, sizes = tables(30)
    low, high = int(sizes.sum(0).min()), int(sizes.amax(1).sum())
    budgets = [low + (high - low) * step // 20 for step in range(21)]
    found = [total(costs, rule(costs, sizes, budget)) for budget in budgets]
    assert found == sorted(found, reverse=True)
    assert found[-1] == total(costs, [3] * 30)


def test_thinned_states_stay_close_and_within_the_budget() -> None:
    costs, sizes = tables(60)
    budget = int(sizes[:, 1].sum())
    exact, thinned = (DP(states)(costs, sizes, budget) for states in (10**6, 300))
    assert total(sizes, thinned) <= budget
    assert total(costs, exact) <= total(costs, thinned) < 1.02 * total(costs, exact)


def test_a_cost_below_zero_and_an_option_that_is_both_better_and_smaller() -> None:
    costs, sizes = torch.tensor([[1.0, -2.0], [0.5, 0.7]]), torch.tensor([[10, 8], [4, 6]])
    for rule in (DP(), Lagrange()):
        assert rule(costs, sizes, 12) == [1, 0]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_budget_that_nothing_fits_names_the_least(rule: Rule) -> None:
    costs, sizes = tables(5)
    least = int(sizes.amin(1).sum())
    with pytest.raises(OverBudget) as refusal:
        rule(costs, sizes, least - 1)
    assert refusal.value.least == least
    assert total(sizes, rule(costs, sizes, least)) == least


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"method\.rule\.states=0: give a whole number, 1 or more"):
        DP(0)
