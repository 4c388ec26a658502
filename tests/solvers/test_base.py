"""The error of a solution in a Hessian."""

import pytest
import torch

from qexp.solvers.base import STRIP, error


@pytest.mark.parametrize("columns", [24, STRIP, 2 * STRIP + 72])
def test_the_error_is_the_trace_of_the_quadratic_form(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(5, columns, generator=generator)
    inputs = torch.randn(50, columns, generator=generator)
    hessian = inputs.T @ inputs
    exact = torch.trace(change.double() @ hessian.double() @ change.double().T)
    assert error(change, hessian) == pytest.approx(float(exact), rel=1e-5)
    assert error(change, None) == pytest.approx(float(change.double().square().sum()), rel=1e-6)
