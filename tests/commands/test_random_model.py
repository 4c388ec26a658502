"""Random models of any size, written shard by shard."""

import torch

from qexp.cli import command
from qexp.models.local import Local

SIZES = "--hidden 16 --inner 24 --blocks 2 --heads 2 --kv-heads 1 --vocabulary 264"


def test_a_random_model_loads_and_is_its_seed(tmp_path, capsys):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert command("random-model", [str(tmp_path / name), *SIZES.split(), "--seed", seed]) == 0
    assert "B weights" in capsys.readouterr().out
    one, same, other = (Local(str(tmp_path / n), "bfloat16").loaded().model for n in "abc")
    head = "lm_head.weight"
    assert one.get_parameter(head).dtype == torch.bfloat16 and len(one.model.layers) == 2
    assert torch.equal(one.get_parameter(head), same.get_parameter(head))
    assert not torch.equal(one.get_parameter(head), other.get_parameter(head))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 3  # a shard for each block


def test_a_folder_that_exists_is_kept(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command("random-model", [str(tmp_path), *SIZES.split()]) == 1
    assert "already exists" in capsys.readouterr().err


def test_random_model_prints_its_options(capsys):
    assert command("random-model", ["--help"]) == 0
    assert "--kv-heads" in capsys.readouterr().out
