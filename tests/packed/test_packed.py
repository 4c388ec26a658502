"""Every stored form through a file and back."""

import pytest
import torch
from helpers.problems import TWO_LEVELS, problem

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed import weights_file
from qexp.packed.bitpacking import pack_bits, unpack_bits
from qexp.solvers import GPTQ, LNQ, BiLLM, Solver, SpQR
from qexp.solvers.billm import Binarize
from qexp.solvers.low_rank import Correction
from qexp.solvers.pbllm import PBLLM
from qexp.solvers.quip import QuIP

SOLVERS: dict[str, Solver] = {
    "gptq": GPTQ(IntGrid(3, group_size=32, scale_dtype="bfloat16"), act_order=True),
    "spqr": SpQR(TWO_LEVELS, act_order=True, outlier_dtype="float16"),
    "billm": BiLLM(block=40, scale_dtype="float16"),
    "binary": Binarize(64, "float16"),
    "pbllm": PBLLM(IntGrid(8, scale_dtype="float16"), scale_dtype="float16"),
    "table": LNQ(3),
    "quip": QuIP(IntGrid(2, per_tensor=True, scale_dtype="float16")),
    "low rank": Correction(4, factors="int8").around(GPTQ(IntGrid(3, group_size=32))),
}


def test_every_form_comes_back_from_a_file(tmp_path) -> None:
    solutions = {name: solver(*problem()) for name, solver in SOLVERS.items()}
    extra = {"range": torch.arange(3.0)}
    weights_file.save(tmp_path, {name: each.packed for name, each in solutions.items()}, extra)
    packed, others = weights_file.load(tmp_path)
    assert set(packed) == set(solutions) and torch.equal(others["range"], extra["range"])
    for name, solution in solutions.items():
        assert type(packed[name]) is type(solution.packed)
        assert torch.equal(packed[name].dequantize(), solution.weight)
        assert packed[name].bits() == solution.bits


def test_the_file_is_as_small_as_the_bits_say(tmp_path) -> None:
    solution = SOLVERS["spqr"](*problem(192, 192))
    weights_file.save(tmp_path, {"layer": solution.packed}, {})
    size = (tmp_path / weights_file.FILE).stat().st_size
    assert 8 * size < solution.packed.size() + 8 * 2500  # the header names tensors and layout


def test_a_damaged_file_is_named(tmp_path) -> None:
    (tmp_path / weights_file.FILE).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=weights_file.FILE):
        weights_file.load(tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 16])
def test_codes_of_any_width_come_back(bits: int) -> None:
    codes = torch.randint(2**bits, (7, 13), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, (7, 13)), codes)


def test_the_first_code_has_the_lowest_bits_as_files_of_every_version_hold_it() -> None:
    assert pack_bits(torch.tensor([5, 3, 1]), 3).tolist() == [5 + (3 << 3) + (1 << 6), 0]
    assert pack_bits(torch.tensor([0x123, 0x2AB]), 10).tolist() == [0x23, 0xAD, 0x0A]
