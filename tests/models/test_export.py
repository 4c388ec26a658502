"""Float training as a run, and the folder that it leaves, which transformers reads by itself."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import FAMILIES, joined, tiny
from helpers.pipeline import PPL, SMALL, run
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM, AutoTokenizer

from qexp import cli
from qexp.common.errors import UserError
from qexp.models import export
from qexp.models.base import AUTO, Loaded
from qexp.models.linearize import linearize, published
from qexp.models.random import Random

pytestmark = pytest.mark.usefixtures("configured")


FLOAT = [*SMALL, "trainer=smoke", "method=finetune", "method.optimizer.weights=1e-3"]


def logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    inputs = {key: value for key, value in joined(family).items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_state_is_the_familys_own(family, tmp_path):
    model = tiny(family).model
    model.save_pretrained(tmp_path, state_dict=published(model))
    objective = {"bert": "masked_lm", "vit": "image_classification"}.get(family, "causal_lm")
    again = AUTO[objective].from_pretrained(tmp_path)
    assert torch.equal(logits(linearize(again), family), logits(model, family))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_float_training_learns_and_its_folder_is_a_model(tmp_path, family):
    float_, folder = f"model=tiny_{family}", tmp_path / "folder"
    tuned = run(tmp_path / "run", float_, small=FLOAT)
    assert "weight/bits" not in tuned
    assert tuned[PPL] < run(tmp_path / "before", float_, "method=none")[PPL]
    export.export(tmp_path / "run", folder)
    local = ("model=local", f"model.path={folder}", "method=none")
    assert run(tmp_path / "again", *local)[PPL] == pytest.approx(tuned[PPL], rel=1e-6)
    with pytest.raises(UserError, match="already exists"):
        export.export(tmp_path / "run", folder)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_folder_cannot_hold_is_refused(tmp_path):
    run(tmp_path / "run", "model=tiny_llama", "method=none", "activation=int8_tensor")
    with pytest.raises(UserError, match="activations are quantized"):
        export.export(tmp_path / "run", tmp_path / "folder")
    run(tmp_path / "moved", "model=tiny_mistral", "method=none", "transform=smooth")
    export.export(tmp_path / "moved", tmp_path / "smooth")
    assert not (tmp_path / "folder").exists() and (tmp_path / "smooth").is_dir()
    everywhere = ("transform=os_plus", "transform.sites=norms+value+up", "transform.points=2")
    run(tmp_path / "shifted", "model=tiny_qwen2", "method=none", *everywhere)
    with pytest.raises(UserError, match=r"o_proj\.bias: a qwen2 model folder has no place"):
        export.export(tmp_path / "shifted", tmp_path / "folder")


def test_the_command_trains_then_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)  # that of this module's fixture

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qexp", "train", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0

    words = [key for key in FLOAT if not key.startswith("method=")] + ["hydra/job_logging=none"]
    assert call("made", "model=tiny_gpt2", "logger=none", *words) == 0
    [folder] = Path("outputs").iterdir()
    with (folder / "training.csv").open() as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["4.0", "8.0"]
    model = AutoModelForCausalLM.from_pretrained("made")
    assert AutoTokenizer.from_pretrained("made")("a")["input_ids"]
    assert model.config.n_layer == 3
    capsys.readouterr()
    assert call("made", "model=tiny_gpt2", "logger=none", *words) == 1
    assert "already exists" in capsys.readouterr().err
    assert call("other", "model=tiny_gpt2", "logger=none", *words) == 0  # answered, then written
    assert len(list(Path("outputs").iterdir())) == 1
    assert call("model=tiny_gpt2") == 1


def test_a_random_model_takes_a_tokenizer_and_no_noise(tmp_path):
    tiny("gpt2").tokenizer.save_pretrained(tmp_path)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 264}
    loaded = Random("gpt2", sizes, noise=0.0, tokenizer=str(tmp_path)).loaded()
    assert isinstance(loaded, Loaded) and loaded.tokenizer is not None
    assert loaded.tokenizer("abc")["input_ids"] == tiny("gpt2").tokenizer("abc")["input_ids"]
    norm = loaded.model.transformer.ln_f
    assert torch.equal(norm.weight, torch.ones(16)) and torch.equal(norm.bias, torch.zeros(16))
    with pytest.raises(UserError, match=r"model\.tokenizer: .*absent"):
        Random("gpt2", sizes, tokenizer=str(tmp_path / "absent")).files()
