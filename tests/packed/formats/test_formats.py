"""Formats of other software, without a model: packing, layouts, refusals, damaged tensors."""

import json
from dataclasses import replace
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch
from helpers.models import data_dir
from safetensors.torch import load_file
from torch import Tensor

from qexp.grid import IntGrid, LevelGrid
from qexp.packed.binary import Binary, Halves
from qexp.packed.coded import Coded
from qexp.packed.formats import awq, compressed_tensors, gguf, gptq, mlx, nf4, words
from qexp.packed.formats.checks import Unreadable, coded_refusal, of_integers
from qexp.packed.outliers import Outliers

GOLDEN = (data_dir() or Path(".")).parent / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden outputs on this machine")


def coded(bits: int = 4, size: int | None = 32, symmetric: bool = False, **fields) -> Coded:
    """A random matrix [64, 96] rounded to nearest."""
    grid = IntGrid(bits, symmetric, group_size=size, scale_dtype="float16", **fields)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    scales = grid.scales_of(weight)
    wide = scales.map(lambda part: part.repeat_interleave(96 // part.shape[1], 1))
    return Coded.of(grid, grid.round(weight, wide), scales)


def same(one: Coded, other: Coded) -> None:
    """Equal values, scales and codes relative to the zero points."""
    a, b = one.per_column(), other.per_column()
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(one.codes - a.zero, other.codes - b.zero)
    assert torch.equal(one.dequantize(), other.dequantize())


def stream(codes: Tensor, bits: int) -> list[list[int]]:
    """Words of every row by arithmetic on long integers."""
    found = []
    for row in codes.tolist():
        whole = sum(code << (index * bits) for index, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        found.append([(whole >> (32 * index)) & 0xFFFFFFFF for index in range(count)])
    return found


# words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 5, 31, 32, 33, 96])
def test_words_are_one_little_endian_stream_a_row(bits, count):
    codes = torch.randint(2**bits, (3, count), dtype=torch.int32)
    packed = words.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape[1] == words.words(count, bits)
    assert (packed.numpy().view(np.uint32) == np.array(stream(codes, bits))).all()
    assert torch.equal(words.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_padded_words_are_read(bits):
    codes, each = torch.randint(2**bits, (3, 40), dtype=torch.int32), 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -40 % each)).reshape(3, -1, each)
    rows = [[sum(c << (i * bits) for i, c in enumerate(w)) for w in row] for row in padded.tolist()]
    packed = torch.from_numpy(np.array(rows, np.uint32).view(np.int32))
    assert packed.shape[1] == words.padded_words(40, bits)
    assert torch.equal(words.unpack_padded(packed, bits, 40), codes)


# layouts -----------------------------------------------------------------------------------------

GRIDS = {
    "group": {"size": 32},
    "channel": {"size": None},
    "tensor": {"size": None, "per_tensor": True},
}
FORMATS = {"compressed_tensors": compressed_tensors, "gptq": gptq, "awq": awq, "mlx": mlx}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_is_read_as_it_was(name, bits, kind, symmetric):
    format, matrix = FORMATS[name], coded(bits, symmetric=symmetric, **GRIDS[kind])
    if format.refusal(matrix) is not None:
        assert bits not in (4, 8) or name != "gptq"
        assert name != "compressed_tensors"
        assert name != "mlx" or bits == 7 or kind != "group"
        assert name != "awq" or bits != 4
        return
    config = json.loads(json.dumps(format.config({"x": matrix}, ["lm_head"])))
    tensors = {end: tensor.clone() for end, tensor in format.write(matrix).items()}
    assert tensors.keys() <= set(format.PARTS) and all(t.is_contiguous() for t in tensors.values())
    same(format.read(tensors, config, "x"), matrix)


def test_compressed_tensors_packs_codes_along_columns_and_zeros_along_rows():
    matrix = coded(3)
    tensors = compressed_tensors.write(matrix)
    assert tensors["weight_shape"].tolist() == [64, 96]
    assert torch.equal(words.unpack(tensors["weight_packed"], 3, 96), matrix.codes)
    zeros = words.unpack(tensors["weight_zero_point"].T.contiguous(), 3, 64).T
    assert tensors["weight_zero_point"].shape == (6, 3) and torch.equal(zeros, matrix.zero.int())
    assert tensors["weight_scale"].dtype == torch.float32


def test_compressed_tensors_of_padded_words_and_of_other_targets_is_read():
    matrix = coded(3, symmetric=True)
    tensors = compressed_tensors.write(matrix)
    rows = torch.nn.functional.pad(matrix.codes, (0, -96 % 10)).reshape(64, -1, 10).long()
    packed = (rows << torch.arange(0, 30, 3)).sum(-1).int()
    config = compressed_tensors.config({"a": matrix, "b": coded(8, symmetric=True)}, [])
    assert [group["targets"] for group in config["config_groups"].values()] == [["a"], ["b"]]
    narrow = replace(matrix, codes=matrix.codes[:, :32], scale=matrix.scale[:, :1])  # one group
    assert len(compressed_tensors.config({"a": matrix, "b": narrow}, [])["config_groups"]) == 1
    config["config_groups"]["group_0"]["targets"] = ["re:.*blocks[.]a$"]
    found = compressed_tensors.read(tensors | {"weight_packed": packed}, config, "blocks.a")
    same(found, matrix)
    with pytest.raises(Unreadable, match="target of none"):
        compressed_tensors.read(tensors, config, "c")


@pytest.mark.parametrize("per_tensor", [True, False])
def test_w8a8_is_int8_with_a_scale_a_row(per_tensor):
    matrix = coded(8, None, True, per_tensor=per_tensor)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    tensors = compressed_tensors.write(matrix, inputs)
    assert tensors["weight"].dtype == torch.int8 and tensors["weight_scale"].shape == (64, 1)
    assert torch.equal(tensors["weight"].int() + 128, matrix.codes)
    config = compressed_tensors.config({"x": matrix}, [], inputs)
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"] == inputs
    same(compressed_tensors.read(tensors, config, "x"), matrix)
    assert compressed_tensors.layout(coded(4), inputs) == "pack-quantized"


@pytest.mark.parametrize("per_tensor", [True, False])
def test_fp8_is_torchs_float8(per_tensor):
    grid = LevelGrid("e4m3", per_tensor=per_tensor)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scales = grid.scales_of(weight)
    matrix = Coded.of(grid, grid.round(weight, scales), scales)
    tensors = compressed_tensors.write(matrix)
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    values = tensors["weight"].float() * tensors["weight_scale"]
    assert torch.equal(values, matrix.dequantize())
    same(
        compressed_tensors.read(tensors, compressed_tensors.config({"x": matrix}, []), "x"), matrix
    )


def test_gptq_stores_one_less_than_the_zero_in_version_1_and_the_zero_in_2():
    tensors = gptq.write(coded(4, symmetric=True))
    assert set(tensors["qzeros"].flatten().tolist()) == {0x77777777}
    matrix = coded(4)
    tensors = gptq.write(matrix)
    assert torch.equal(words.unpack(tensors["qzeros"], 4, 64), matrix.zero.int().T)
    zero = torch.tensor([0.0, 15.0]).repeat(32)[:, None].expand(64, 3)
    ends = replace(matrix, zero=zero)
    stored = gptq.write(ends)
    stored["qzeros"] = words.pack((zero.T.int() - 1) & 15, 4)  # version 1 of it wraps at 0
    config = gptq.config({"x": ends}, []) | {"checkpoint_format": "gptq"}
    same(gptq.read(stored, config, "x"), ends)
    assert torch.equal(words.unpack(stored["qweight"].T.contiguous(), 4, 96), matrix.codes)


def test_gptq_holds_groups_that_are_not_neighbours():
    group = torch.randperm(96, generator=torch.Generator().manual_seed(0)) // 32
    matrix = replace(coded(4), group=group)
    assert gptq.refusal(matrix) is None
    for other in (compressed_tensors, awq, mlx, gguf):
        assert "static_groups=false" in str(other.refusal(matrix))
    config = gptq.config({"x": matrix}, [])
    assert config["desc_act"]
    found = gptq.read(gptq.write(matrix), config, "x")
    assert torch.equal(found.group, group)
    same(found, matrix)


def test_awq_mixes_eight_rows_in_a_word():
    matrix = coded(4)
    word = int(awq.write(matrix)["qweight"].numpy().view(np.uint32)[5, 2])
    rows = [16 + place for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert [(word >> (4 * i)) & 15 for i in range(8)] == matrix.codes[rows, 5].tolist()


def test_nf4_is_bitsandbytes_own():
    grid = LevelGrid("nf4", group_size=32)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scales = grid.scales_of(weight)
    wide = scales.map(lambda part: part.repeat_interleave(32, 1))
    matrix = Coded.of(grid, grid.round(weight, wide), scales)
    tensors = nf4.write(matrix)
    same(nf4.read(tensors, nf4.config({"x": matrix}, []), "x"), matrix)
    assert "weight=nf4" in str(nf4.refusal(coded(4)))
    assert "weight.kind=nf4" in str(gptq.refusal(matrix))
    assert "e4m3" in str(compressed_tensors.refusal(matrix))


# GGUF --------------------------------------------------------------------------------------------

CONTAINERS = {
    **{(bits, False): "Q4_0" for bits in (2, 3)},
    **{(bits, True): "Q4_0" for bits in (2, 3, 4)},
    **{(4, False): "Q5_0", (5, True): "Q5_0", (5, False): "Q8_0"},
    **{(6, True): "Q8_0", (6, False): "Q8_0", (7, True): "Q8_0", (7, False): "Q8_0"},
    (8, True): "Q8_0",
}


@pytest.mark.parametrize(("bits", "symmetric"), CONTAINERS)
@pytest.mark.parametrize("size", [32, None])
def test_gguf_blocks_are_what_the_gguf_package_reads(bits, symmetric, size):
    matrix = coded(bits, size, symmetric)
    assert gguf.refusal(matrix) is None
    name, data = gguf.write(matrix)
    assert name == CONTAINERS[bits, symmetric]
    kind = gguf_package.GGMLQuantizationType[name]
    assert (gguf_package.quants.dequantize(data.numpy(), kind) == matrix.dequantize().numpy()).all()
    same(gguf.read(name, data), matrix)


@pytest.mark.parametrize("name", gguf.TYPES)
def test_gguf_blocks_of_the_gguf_package_are_read(name):
    kind = gguf_package.GGMLQuantizationType[name]
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    data = gguf_package.quants.quantize(weight, kind)
    found = gguf.read(name, torch.from_numpy(data)).dequantize().numpy()
    assert (found == gguf_package.quants.dequantize(data, kind)).all()


# refusals ----------------------------------------------------------------------------------------


def test_a_refusal_names_the_key():
    matrix = coded(4)
    said = [
        (gguf.refusal(coded(8)), "weight.bits=8"),
        (gguf.refusal(coded(4, 16)), "weight.group_size=16"),
        (gptq.refusal(coded(5)), "weight.bits=5"),
        (awq.refusal(coded(8)), "weight.bits=8"),
        (mlx.refusal(coded(4, None)), "weight.group_size=None"),
        (compressed_tensors.refusal(replace(matrix, grid=IntGrid(9))), "weight.bits=9"),
        (compressed_tensors.refusal(coded(4, real_zero=True)), "weight.real_zero=true"),
        (gptq.refusal(replace(matrix, scale=matrix.scale + 1e-6)), "weight.scale_dtype"),
        (gguf.refusal(replace(matrix, scale=matrix.scale * 1e-9)), "weight.scale_dtype"),
    ]
    for sentence, key in said:
        assert sentence is not None and sentence.startswith(key), (sentence, key)


def test_matrices_without_plain_codes_are_refused():
    matrix = coded(4)
    outliers = Outliers.of(matrix.dequantize(), matrix.dequantize() > 2, "float16")
    assert "outliers" in str(coded_refusal(replace(matrix, outliers=outliers)))
    assert "second time" in str(coded_refusal(replace(matrix, scale=coded(4))))
    signs = Binary(96, Halves(matrix.codes > 7), torch.ones(64, 1, 2))
    assert "method: its matrices are stored as Binary" in str(coded_refusal(signs))
    assert coded_refusal(matrix) is None


# damaged tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_tensor_is_named(name):
    format, matrix = FORMATS[name], coded(4)
    config, whole = format.config({"x": matrix}, []), format.write(matrix)
    for end in whole.keys() - {"g_idx"}:
        lacking = {key: tensor for key, tensor in whole.items() if key != end}
        with pytest.raises(Unreadable, match=f"has no {end}"):
            format.read(lacking, config, "x")
        cut = whole | {end: whole[end][:-1]}
        with pytest.raises(Unreadable, match=r"shape|whole|do not divide|names groups"):
            format.read(cut, config, "x")


def test_what_is_unknown_is_named():
    matrix = coded(4)
    config = compressed_tensors.config({"x": matrix}, [])
    own = config["config_groups"]["group_0"]
    tensors = compressed_tensors.write(matrix)
    for changed, said in (
        ({"format": "marlin-24"}, "marlin-24"),
        ({"weights": own["weights"] | {"strategy": "block"}}, "strategy block"),
    ):
        broken = config | {"config_groups": {"group_0": own | changed}}
        with pytest.raises(Unreadable, match=said):
            compressed_tensors.read(tensors, broken, "x")
    with pytest.raises(Unreadable, match="gptq_v3"):
        gptq.read(gptq.write(matrix), {"checkpoint_format": "gptq_v3", "bits": 4}, "x")
    with pytest.raises(Unreadable, match="version gemv"):
        awq.read(awq.write(matrix), {"version": "gemv"}, "x")
    with pytest.raises(Unreadable, match="type Q4_K"):
        gguf.read("Q4_K", torch.zeros(1, 144, dtype=torch.uint8))
    biases = mlx.write(matrix)
    biases["biases"] = biases["biases"] * 1.01
    with pytest.raises(Unreadable, match="no multiples"):
        mlx.read(biases, mlx.config({"x": matrix}, []), "x")


def test_numbers_out_of_range_are_named():
    codes, scale = torch.zeros(2, 8, dtype=torch.int32), torch.ones(2, 2)
    for kwargs, said in (
        ({"codes": codes + 16}, "codes outside of 0"),
        ({"zero": scale * 16}, "zero points outside"),
        ({"scale": scale / 0}, "not finite"),
        ({"scale": torch.ones(2, 3)}, "do not divide"),
        ({"group": torch.full((8,), 2)}, "beyond its 2"),
    ):
        fields = {"codes": codes, "scale": scale, "zero": None, **kwargs}
        with pytest.raises(Unreadable, match=said):
            of_integers(4, **fields)


def test_negative_scales_and_zero_scales_keep_their_values():
    codes = torch.arange(16, dtype=torch.int32).reshape(1, 16)
    scale = torch.tensor([[-0.5, 0.0]])
    for zero in (None, torch.tensor([[3.0, 5.0]])):
        found = of_integers(4, codes, scale, zero)
        middle = torch.tensor([8.0, 8.0]) if zero is None else zero[0]
        expected = (codes - middle.repeat_interleave(8)) * scale.repeat_interleave(8, 1)
        assert torch.equal(found.dequantize(), expected) and torch.equal(found.scale, scale)


# golden ------------------------------------------------------------------------------------------


@golden
@pytest.mark.parametrize("key", ["int4.asym.g64", "int4.sym.g64", "int8.sym.channel"])
def test_golden_compressed_tensors(key):
    stored = load_file(GOLDEN / "compressed_tensors.safetensors")
    own = {end: stored[f"ct.{key}.{end}"] for end in ("codes", "scale", "zero")}
    bits, symmetric = int(key[3]), ".sym." in key
    middle = 2 ** (bits - 1)
    zero = None if symmetric else own["zero"].float() + middle
    matrix = of_integers(bits, own["codes"].int() + middle, own["scale"], zero)
    assert torch.equal(matrix.dequantize(), stored[f"ct.{key}"])
    config = compressed_tensors.config({"x": matrix}, [])
    same(compressed_tensors.read(compressed_tensors.write(matrix), config, "x"), matrix)


@golden
@pytest.mark.parametrize("key", ["w4.sym.g64", "w3.sym.g64", "w2.sym.g64"])
def test_golden_autoround_with_its_negative_scales(key):
    stored = load_file(GOLDEN / "autoround.safetensors")
    weight, scale, bits = stored[f"autoround.{key}"], stored[f"autoround.{key}.scale"], int(key[1])
    wide = scale.repeat_interleave(64, 1)
    signed = (weight / wide).round().int()
    assert bool((scale < 0).any()) and torch.equal(signed * wide, weight)
    matrix = of_integers(bits, signed + 2 ** (bits - 1), scale, None)
    assert torch.equal(matrix.dequantize(), weight)
    same(gptq.read(gptq.write(matrix), gptq.config({"x": matrix}, []), "x"), matrix)


@golden
def test_golden_bitsandbytes():
    stored = load_file(GOLDEN / "bitsandbytes.safetensors")
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [96, 576]}
    tensors = {
        "weight": stored["bnb.nf4.b64.packed"].reshape(-1, 1),
        "weight.absmax": stored["bnb.nf4.b64.absmax"],
        nf4.STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    matrix = nf4.read(tensors, {}, "x")
    torch.testing.assert_close(matrix.dequantize(), stored["bnb.nf4.b64"], rtol=0, atol=1e-6)
    written = nf4.write(matrix)
    assert torch.equal(written["weight"], tensors["weight"])
    torch.testing.assert_close(written["weight.quant_map"], stored["bnb.nf4.table"])


@golden
@pytest.mark.parametrize("key", ["asym", "sym", "sym_noclip"])
def test_golden_torchao_leaves_as_compressed_tensors(key):
    stored = load_file(GOLDEN / "torchao.safetensors")
    name = f"ao.int4.{key}.g64"
    shift = 0 if key == "asym" else 8
    zero = stored[f"{name}.zero"].float() + shift
    matrix = of_integers(4, stored[f"{name}.codes"].int() + shift, stored[f"{name}.scale"], zero)
    assert torch.equal(matrix.dequantize(), stored[name])
    config = compressed_tensors.config({"x": matrix}, [])
    same(compressed_tensors.read(compressed_tensors.write(matrix), config, "x"), matrix)
