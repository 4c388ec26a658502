"""The second moment of a layer's inputs."""

import torch

from qexp.hessian import second_moment
from qexp.hessian.layerwise import STRIP


def test_strips_of_the_triangle_make_the_whole_symmetric_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(3, 5, 2 * STRIP + 40, generator=generator) for _ in range(2)]
    hessian = second_moment(chunks)
    rows = torch.cat(chunks).flatten(0, 1).double()
    exact = 2 / len(rows) * rows.T @ rows
    torch.testing.assert_close(hessian.double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(hessian, hessian.T)
