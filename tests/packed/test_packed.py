"""Every stored form through a file and back."""

import pytest
import torch
from helpers.problems import TWO_LEVELS, is_stored_whole, problem

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed import bitpacking, weights_file
from qexp.packed.bitpacking import pack_bits, unpack_bits
from qexp.packed.parts import Parts
from qexp.solvers import GPTQ, LNQ, BiLLM, Solver, SpQR
from qexp.solvers.adpq import AdpQ
from qexp.solvers.apart import Cast
from qexp.solvers.billm import Binarize
from qexp.solvers.low_rank import Correction
from qexp.solvers.owq import OWQ
from qexp.solvers.pbllm import PBLLM
from qexp.solvers.quip import QuIP
from qexp.solvers.sparse import SparseGPT

SIXTEEN = IntGrid(3, group_size=16, scale_dtype="float16")
SOLVERS: dict[str, Solver] = {
    "gptq": GPTQ(IntGrid(3, group_size=32, scale_dtype="bfloat16"), act_order=True),
    "spqr": SpQR(TWO_LEVELS, act_order=True, outlier_dtype="float16"),
    "billm": BiLLM(block=40, scale_dtype="float16"),
    "binary": Binarize(64, "float16"),
    "pbllm": PBLLM(IntGrid(8, scale_dtype="float16"), scale_dtype="float16"),
    "table": LNQ(3),
    "quip": QuIP(IntGrid(2, per_tensor=True, scale_dtype="float16")),
    "low rank": Correction(4, factors="int8").around(GPTQ(IntGrid(3, group_size=32))),
    "plain": Cast("bfloat16"),
    "parts": OWQ(GPTQ(SIXTEEN, damp=0.0), extra=0.5),
    "marked parts": OWQ(GPTQ(SIXTEEN, damp=0.0), columns=40),
    "rotated part": OWQ(QuIP(IntGrid(2, per_tensor=True, scale_dtype="float16")), columns=2),
    "masked": SparseGPT(SIXTEEN),
    "masked plain": SparseGPT(None, pattern=[2, 4], dtype="bfloat16"),
    "masked twice": AdpQ(IntGrid(4, symmetric=True, group_size=32, scale_dtype="float16")),
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
        assert is_stored_whole(solution)


@pytest.mark.parametrize("name", ["parts", "marked parts", "masked", "masked twice"])
def test_rows_can_be_separated(name: str) -> None:
    solution = SOLVERS[name](*problem())
    part = solution.packed.rows(5, 17)
    assert torch.equal(part.dequantize(), solution.weight[5:17])
    restored = type(part).restore(part.stored(), part.layout())
    assert torch.equal(restored.dequantize(), solution.weight[5:17])


def test_the_parts_say_which_setting_each_was_given() -> None:
    left, right = Cast("float16")(torch.ones(4, 6)).packed, Cast("float16")(torch.ones(4, 2)).packed
    packed = Parts((left, right), choice=torch.tensor([2, 0]), choices=3)
    assert packed.size() == 16 * 32 + 2 * 2
    restored = Parts.restore(packed.stored(), packed.layout())
    assert restored.choice is not None and restored.choice.tolist() == [2, 0]
    assert restored.size() == packed.size() and restored.shape == (4, 8)


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
    assert torch.equal(unpack_bits(packed, bits, (7, 13)).long(), codes)


@pytest.mark.parametrize("bits", [3, 10])
def test_codes_are_packed_in_slices_as_all_at_once(bits: int, monkeypatch) -> None:
    codes = torch.randint(2**bits, (5, 21), generator=torch.Generator().manual_seed(bits))
    whole = pack_bits(codes, bits)
    monkeypatch.setattr(bitpacking, "SLICE", 16)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, bits, (5, 21)).long(), codes)


def test_the_first_code_has_the_lowest_bits_as_files_of_every_version_hold_it() -> None:
    assert pack_bits(torch.tensor([5, 3, 1]), 3).tolist() == [5 + (3 << 3) + (1 << 6), 0]
    assert pack_bits(torch.tensor([0x123, 0x2AB]), 10).tolist() == [0x23, 0xAD, 0x0A]
