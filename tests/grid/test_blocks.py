"""llama.cpp's grids against the gguf package."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import BlockGrid, IntGrid, Scale
from qexp.grid.blocks import TYPES, Extreme
from qexp.grid.ranges import MSE
from qexp.packed.base import restored
from qexp.packed.coded import Coded
from qexp.packed.formats import gguf as blocks
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.rounding_variable import Shifted
from qexp.solvers.gptq import GPTQ
from qexp.solvers.rtn import RTN


def matrix(seed: int = 0, rows: int = 64) -> Tensor:
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed)) * 0.05


def odd() -> Tensor:
    """Ties between extremes and between codes, zeros, numbers of other sizes."""
    values = matrix(1).bfloat16().float()  # few mantissa bits: many ties
    values[0] = 0
    values[1, :32] = torch.arange(32) % 2 * 2 - 1.0  # ± the same extreme, by turns
    values[2] = torch.arange(96) / 16 - 3
    values[3] *= 1000
    values[4, ::3] = 0
    return values


def packed(bits: int, weight: Tensor) -> np.ndarray:
    return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[TYPES[bits]])


@pytest.mark.parametrize("bits", TYPES)
@pytest.mark.parametrize("weight", [matrix(), odd()], ids=["normal", "odd"])
def test_rounding_to_nearest_gives_the_bytes_of_the_gguf_package(bits, weight):
    solution = RTN(BlockGrid(bits))(weight)
    assert solution.bits == bits + 0.5
    name, data = blocks.write(solution.packed)
    expected = packed(bits, weight)
    assert name == TYPES[bits] and (data.numpy() == expected).all()
    values = gguf.quants.dequantize(expected, gguf.GGMLQuantizationType[name])
    assert (solution.weight.numpy() == values).all()


@pytest.mark.parametrize("bits", TYPES)
def test_gptq_without_correlations_is_nearest_to_stored_values(bits):
    weight, grid = matrix(), BlockGrid(bits)
    solution = GPTQ(grid, static_groups=True)(weight, torch.eye(96))
    nearest = RTN(grid)(weight)
    assert torch.equal(solution.packed.scale, nearest.packed.scale)
    error, least = ((each.weight - weight).abs() for each in (nearest, solution))
    assert bool((least <= error).all())  # llama.cpp rounds by the scale before float16
    assert float((solution.packed.codes != nearest.packed.codes).float().mean()) < 0.01
    assert bool((nearest.packed.scale < 0).any()) == (bits != 8)


@pytest.mark.parametrize("bits", TYPES)
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"refit": True, "descend": 1}])
def test_what_gptq_rounds_is_what_a_file_holds(bits, options):
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(2))
    hessian = (x @ torch.randn(96, 96, generator=torch.Generator().manual_seed(3))).T
    hessian = hessian @ hessian.T / 400
    grid = BlockGrid(bits)
    solution = GPTQ(grid, static_groups=True, **options)(odd(), hessian)
    found = blocks.read(*blocks.write(solution.packed))
    assert torch.equal(found.codes, solution.packed.codes)
    assert torch.equal(found.dequantize(), solution.weight)
    again = restored(solution.packed.stored(), solution.packed.described())
    assert torch.equal(again.dequantize(), solution.weight) and again.bits() == bits + 0.5
    gap = solution.weight - odd()
    plain = RTN(grid)(odd()).weight - odd()
    assert float((gap @ hessian * gap).sum()) < float((plain @ hessian * plain).sum())


def test_the_lowest_code_is_the_extreme_of_either_sign():
    x = torch.tensor([[1.0, -0.5, 0.25, -1.0], [-2.0, 1.9, 0.0, 2.0]])
    grid = BlockGrid(4, group_size=4)
    q = grid.fit(x)
    assert q.scale.flatten().tolist() == [-0.125, 0.25]
    assert grid.encode(x, q)[:, 0].tolist() == [0, 0]
    assert torch.equal(q.fitted[0].flatten(), torch.tensor([-0.875, -2.0]))
    counts = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert grid.fit(x, counts).scale.flatten().tolist() == [0.0625, 0.25]


@pytest.mark.parametrize("bits", TYPES)
def test_other_ranges_scale_the_grid_too(bits):
    weight = matrix()
    for_all = RTN(BlockGrid(bits, range=MSE(norm=2.0, shrink=0.3)))(weight)
    extreme = RTN(BlockGrid(bits))(weight)
    own = (for_all.weight - weight).square().sum()
    assert float(own) <= float((extreme.weight - weight).square().sum()) * 1.0001
    blocks.write(for_all.packed)


def test_positions_of_a_group_of_zeros_are_numbers():
    grid = BlockGrid(4)
    q = Scale(torch.zeros(1, 1), torch.full((1, 1), 8.0))
    assert grid.position(torch.zeros(1, 3), q).tolist() == [[8.0] * 3]
    assert grid.round(torch.zeros(1, 3), q).tolist() == [[0.0] * 3]
    clipped = grid.clip(torch.tensor([[-9.0, 9.0]]), Scale(-torch.ones(1, 1), q.zero))
    assert clipped.tolist() == [[-7.0, 8.0]]


def test_settings_that_blocks_do_not_have():
    for fields, said in (
        ({"bits": 6}, "bits=6: .* 4 \\(Q4_0\\)"),
        ({"scale_dtype": "float32"}, "scale_dtype=float16"),
        ({"per_tensor": True}, "per_tensor=false"),
    ):
        with pytest.raises(UserError, match=said):
            BlockGrid(**fields)
    assert BlockGrid(4).with_bits(8).bits == 8
    size = IntGrid(4, symmetric=True, group_size=32, range=Extreme()).fit(matrix()[:, :32])
    assert bool((size.scale > 0).all())


def test_codes_of_signed_scales_are_those_of_the_matrix():
    solution = RTN(BlockGrid(4))(matrix())
    same = Coded.of(BlockGrid(4), solution.weight, solution.packed.scales())
    assert torch.equal(same.codes, solution.packed.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_extreme_of_each_group_is_the_lowest_code(bits: int) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    grid = BlockGrid(bits, group_size=16)
    groups = x.reshape(-1, 16)
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    q = grid.fit(groups)
    torch.testing.assert_close(q.scale, extreme / -(2 ** (bits - 1)), rtol=1e-3, atol=0)
    codes = grid.encode(groups, q)
    assert (codes.gather(1, groups.abs().argmax(1, keepdim=True)) == 0).all()
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert ((grid(x) - x).reshape(-1, 16).abs() <= q.scale.abs() * 1.001).all()


def test_rounding_variables_of_zero_are_round_to_nearest_on_signed_scales() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    grid = BlockGrid(3, group_size=32)
    made = Shifted(grid, FakeQuantize(), weight)
    stored = made.coded(weight).dequantize()
    torch.testing.assert_close(stored, made.eval()(weight).detach())
    q = grid.scales_of(weight)
    step = q.scale.repeat_interleave(32, 1).abs()
    assert ((stored - grid(weight)).abs() <= 1.001 * step * (stored != grid(weight))).all()
    assert (stored != grid(weight)).float().mean() < 0.01  # ties and rounded scales alone
    made.rounding.data.fill_(0.4)
    assert not torch.equal(made(weight), stored)
