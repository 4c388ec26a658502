"""Solvers on a simulated device: the CPU's solutions, and what a column and a matrix cost there."""

from collections.abc import Iterator

import pytest
import torch
import yaml
from helpers.choices import CONF
from helpers.problems import problem
from helpers.simulated_device import Counts, counting, simulated
from hydra import compose
from omegaconf import DictConfig
from torch import Tensor

from qexp.config.instantiate import instantiate
from qexp.solvers import Solution, Solver
from qexp.solvers.base import Moments
from qexp.solvers.both_sides import joined

pytestmark = pytest.mark.usefixtures("configured", "devices")

ROWS, COLUMNS = 16, (64, 128)
# What depends on the number of columns, or on the data, by its nature.
FIXED = {
    "lnq": ["method.solver.steps=1"],  # else Lloyd's algorithm takes its steps until nothing moves
    "squeezellm": ["method.solver.steps=1"],
    "owq": ["method.solver.columns=1"],  # else a share of the columns stays in floating point
}
# Launches by a column, and synchronisations by a matrix.
COSTS = {
    "adpq": (0, 2),
    "billm": (2, 10),
    "gptaq": (10, 3),
    "gptq": (9, 3),
    "lnq": (80, 21),
    "lorc": (0, 0),
    "oac": (15, 8),
    "oac_binary": (2, 10),
    "oac_binary_one_pass": (2, 10),
    "oac_one_pass": (15, 8),
    "obq": (40, 3),
    "owq": (9, 10),
    "pbllm": (12, 5),
    "qronos": (9, 3),
    "quip": (9, 23),
    "rtn": (0, 0),
    "slim": (12.75, 5),
    "slim_llm": (9, 13),
    "sparsegpt": (10, 5),
    "spqr": (15, 8),
    "squeezellm": (0, 10),
    "yaqa": (57.59375, 6),  # a wave of 63 antidiagonals for every 32 columns
}


@pytest.fixture
def devices() -> Iterator[None]:
    with simulated():
        yield


def composed(name: str, columns: int) -> DictConfig:
    """A method whose grid has two groups of columns, whatever their number."""
    cfg = compose("config", [f"method={name}", *FIXED.get(name, [])])
    if isinstance(cfg.weight.get("group_size"), int):
        cfg.weight.group_size = columns // 2
    return cfg


def has_solver(name: str) -> bool:
    """Whether the yaml of a method, or one that it begins with, has a solver. Composing them all
    would take as long as all other tests of this file."""
    written = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    if "solver" in written:
        return written["solver"] is not None
    bases = [each for each in written.get("defaults", []) if isinstance(each, str)]
    return any(has_solver(base) for base in bases if base != "_self_" and "@" not in base)


def test_every_solver_is_here() -> None:
    names = [path.stem for path in (CONF / "method").glob("[!_]*.yaml")]
    assert sorted(COSTS) == sorted(name for name in names if has_solver(name))


def solved(name: str, columns: int, device: str) -> tuple[Solution, Counts]:
    solver: Solver = instantiate(composed(name, columns).method).solver
    weight, hessian = problem(ROWS, columns)
    extra: dict[str, object] = {}
    if solver.needs_moments:
        extra["moments"] = Moments(hessian.to(device), 1.01 * hessian.to(device))
    if solver.needs_both_sides:
        hessian = joined(hessian, problem(columns, ROWS)[1])
    elif solver.needs_diagonal:
        hessian = hessian.diagonal() * torch.linspace(1, 2, ROWS)[:, None]
    weight, hessian = weight.to(device), hessian.to(device)
    with counting() as counts:
        return solver(weight, hessian, **extra), counts


def stored(solution: Solution) -> dict[str, Tensor]:
    return {name: each.cpu() for name, each in solution.packed.stored().items()}


@pytest.mark.parametrize("name", COSTS)
def test_a_solver_finds_what_the_cpu_finds_and_no_column_waits(name: str) -> None:
    launches, syncs = [], []
    for columns in COLUMNS:
        expected, _ = solved(name, columns, "cpu")
        found, counts = solved(name, columns, "sim:1")
        assert found.weight.device == torch.device("sim:1")
        assert torch.equal(found.weight.cpu(), expected.weight)
        files = stored(found), stored(expected)
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
        assert (found.bits, found.damp) == (expected.bits, expected.damp)
        launches.append(counts.launches.total())
        syncs.append(counts.syncs)
    assert syncs[0] == syncs[1], "a synchronisation in the loop over columns"
    by_column = (launches[1] - launches[0]) / (COLUMNS[1] - COLUMNS[0])
    assert (by_column, syncs[0].total()) == COSTS[name]
