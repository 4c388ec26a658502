"""Random models, folders and the hub, on models small enough to write in a test; no network."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import CONF, FAMILIES, batches, tiny
from huggingface_hub.utils import httpx
from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.models.base import Loaded
from qexp.models.hub import Hub, _reachable
from qexp.models.local import Local
from qexp.models.random import Random


@torch.no_grad()
def logits(loaded: Loaded, family: str = "llama") -> torch.Tensor:
    return loaded.model(**batches(family)[0]).logits


# random ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_its_seed(family):
    one, same, other = tiny(family), tiny(family), tiny(family, seed=1)
    assert torch.equal(logits(one, family), logits(same, family))
    assert not torch.equal(logits(one, family), logits(other, family))
    assert not one.model.training


def test_loading_leaves_the_global_random_state():
    state = torch.get_rng_state()
    tiny("llama")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_byte_tokenizer_takes_any_text():
    tokenizer = tiny("llama").tokenizer
    text = "héllo  wörld\n\n\t 日本 <s>x"
    ids = tokenizer(text.replace("<s>", "")).input_ids
    assert len(ids) == len(text.replace("<s>", "").encode())
    assert tokenizer.decode(ids) == text.replace("<s>", "")
    assert len(tokenizer) == 260 and tiny("vit").tokenizer is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dtype": "float8"}, "model.dtype.*'float8'.*bfloat16"),
        ({"objective": "lm"}, "model.objective.*'lm'.*causal_lm"),
        ({"family": "lama"}, "model.family.*'lama'"),
        ({"sizes": {"hiden_size": 3}}, "model.sizes.hiden_size"),
    ],
)
def test_a_wrong_field_is_named(fields, said):
    with pytest.raises(UserError, match=said):
        Random(**{"family": "llama", **fields}).loaded()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_weight(dtype, tmp_path):
    random = tiny("gpt2", dtype=dtype)
    assert {tensor.dtype for tensor in random.model.parameters()} == {getattr(torch, dtype)}
    folder = saved(tmp_path / "model", "llama")
    local = Local(str(folder), dtype=dtype).loaded()
    assert {tensor.dtype for tensor in local.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
def test_auto_is_the_checkpoints_dtype_where_the_model_is_large(own, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", dtype=own)
    source = Local(str(folder))
    size = tiny("llama").model.num_parameters()
    for least, expected in ((size + 1, "float32"), (size, own)):
        monkeypatch.setattr("qexp.models.pretrained.LARGE", least)
        assert source.settled_dtype() == expected
        assert source.fingerprint() == Local(str(folder), dtype=expected).fingerprint()
        assert {str(w.dtype) for w in source.loaded().model.parameters()} == {f"torch.{expected}"}
        for dtype in ("float32", "bfloat16", "float16"):
            assert Local(str(folder), dtype=dtype).settled_dtype() == dtype
    state = torch.get_rng_state()
    (folder / "model.safetensors").unlink()
    assert source.settled_dtype() == own  # without the weights
    assert torch.equal(torch.get_rng_state(), state)


def test_a_large_checkpoint_that_names_no_dtype_is_float32(tmp_path, monkeypatch, caplog):
    folder = saved(tmp_path / "model", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert Local(str(folder)).settled_dtype() == "float32" and not caplog.text
    monkeypatch.setattr("qexp.models.pretrained.LARGE", 1)
    assert Local(str(folder)).settled_dtype() == "float32" and "model.path" in caplog.text
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.path.*dtype=auto.*model\.dtype=float32"):
        Local(str(folder)).settled_dtype()


def test_what_has_no_checkpoint_has_no_dtype_of_its_own():
    with pytest.raises(UserError, match=r"model.dtype: 'auto' is none of"):
        Random("llama", dtype="auto")


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_random_fingerprint_follows_the_weights(family):
    def fingerprint(**fields: object) -> dict[str, str]:
        node = OmegaConf.load(CONF / "model" / f"tiny_{family}.yaml")
        return instantiate(OmegaConf.merge(node, {"seed": 0, **fields})).fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(seed=1)
    assert fingerprint() != fingerprint(dtype="bfloat16")


# folders -----------------------------------------------------------------------------------------


def saved(folder: Path, family: str = "llama", dtype: str = "float32", **options: object) -> Path:
    loaded = tiny(family, dtype=dtype)
    loaded.model.save_pretrained(folder, **options)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}])
def test_a_folder_gives_the_same_logits(tmp_path, options):
    folder = saved(tmp_path / "model", **options)
    assert len(list(folder.glob("*.safetensors"))) == (1 if not options else 7)
    loaded = Local(str(folder)).loaded()
    assert torch.equal(logits(loaded), logits(tiny("llama")))
    assert loaded.tokenizer("abc").input_ids == tiny("llama").tokenizer("abc").input_ids


@pytest.mark.parametrize(("family", "objective"), [("bert", "masked_lm"), ("vit", None)])
def test_a_folder_of_an_encoder(tmp_path, family, objective):
    folder = saved(tmp_path / "model", family)
    loaded = Local(str(folder), objective=objective or "image_classification").loaded()
    assert torch.equal(logits(loaded, family), logits(tiny(family), family))


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file(tmp_path, lost):
    folder = saved(tmp_path / "model")
    (folder / lost).unlink()
    with pytest.raises(UserError, match=f"model.path.*{lost}"):
        Local(str(folder)).loaded()


def test_a_folder_that_lacks_a_shard(tmp_path):
    folder = saved(tmp_path / "model", max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        Local(str(folder)).loaded()


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_half_a_file(tmp_path, broken):
    path = saved(tmp_path / "model") / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"model\.path"):
        Local(str(path.parent)).loaded()


@pytest.mark.parametrize(("name", "said"), [("gone", "does not exist"), ("a.txt", "neither")])
def test_a_path_that_is_no_folder(tmp_path, name, said):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=said):
        Local(str(tmp_path / name)).loaded()


def test_a_head_that_was_never_trained_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"no model.layers.3.*missing"):
        Local(str(folder)).loaded()


def test_a_checkpoint_in_an_unknown_format_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    stored = {"quantization_config": {"quant_method": "aqlm"}}
    (folder / "config.json").write_text(json.dumps(config | stored))
    with pytest.raises(UserError, match="already quantized by aqlm, which is not read"):
        Local(str(folder)).loaded()


def test_a_folder_fingerprint_follows_the_weights(tmp_path):
    source = Local(str(saved(tmp_path / "model")))
    before = source.fingerprint()
    assert before == Local(source.path).fingerprint()
    loaded = tiny("llama", seed=1)
    loaded.model.save_pretrained(source.path)
    changed = {key for key, value in source.fingerprint().items() if value != before[key]}
    assert changed == {"model.safetensors"}
    assert {path.name for path in source.files()} == before.keys() - {"dtype"}


# hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache with org/name at two commits, `main` and the tag `old`; the hub is out of reach."""
    repository = tmp_path / "models--org--name"
    for revision, seed in (("main", 0), ("old", 1)):
        commit = hashlib.sha1(revision.encode()).hexdigest()
        snapshot = repository / "snapshots" / commit
        loaded = tiny("llama", seed=seed)
        loaded.model.save_pretrained(snapshot)
        loaded.tokenizer.save_pretrained(snapshot)
        for file in list(snapshot.iterdir()):
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            shutil.move(file, blob)
            file.symlink_to(blob)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    return repository


def test_a_hub_id_and_its_revisions(hub):
    assert torch.equal(logits(Hub("org/name").loaded()), logits(tiny("llama")))
    old = Hub("org/name", revision="old")
    assert torch.equal(logits(old.loaded()), logits(tiny("llama", seed=1)))
    assert old.loaded().tokenizer("abc").input_ids == tiny("llama").tokenizer("abc").input_ids
    assert old.fingerprint() != Hub("org/name").fingerprint()
    commit = old.fingerprint()["revision"]
    assert Hub("org/name", revision=commit).fingerprint() == old.fingerprint()


def test_auto_at_the_hub(hub, monkeypatch):
    [weights] = (hub / "snapshots").glob(
        f"{Hub('org/name').fingerprint()['revision']}/*.safetensors"
    )
    config = weights.with_name("config.json")
    said = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**said, "dtype": "bfloat16"}))
    assert Hub("org/name").fingerprint()["dtype"] == "float32"
    monkeypatch.setattr("qexp.models.pretrained.LARGE", 1)
    assert Hub("org/name").loaded().model.dtype == torch.bfloat16
    assert Hub("org/name", dtype="float16").fingerprint()["dtype"] == "float16"
    weights.unlink()
    assert Hub("org/name").fingerprint()["dtype"] == "bfloat16"


def test_a_hub_id_that_is_out_of_reach(hub):
    for source in (Hub("org/other"), Hub("org/name", revision="gone")):
        with pytest.raises(UserError, match=r"model\.id: org/.*model=local model\.path=FOLDER"):
            source.loaded()


@pytest.mark.parametrize(
    ("answer", "local"),
    [
        (None, False),
        (httpx.ConnectError("Name or service not known"), True),
        (httpx.ReadTimeout("slow"), False),
        (httpx.ProxyError("403"), False),
    ],
)
def test_a_hub_that_cannot_be_connected_to_is_not_asked_again(monkeypatch, answer, local):
    tried, asked = [], []

    def head(*_: object, max_retries: int, **__: object) -> None:
        tried.append(max_retries)
        if answer is not None:
            raise answer

    def cached(*_: object, local_files_only: bool, **__: object) -> None:
        asked.append(local_files_only)
        raise OSError("there is no such file")

    monkeypatch.setattr("qexp.models.hub.http_backoff", head)
    monkeypatch.setattr("qexp.models.hub.cached_file", cached)
    monkeypatch.setattr("qexp.models.hub._reachable", _reachable.__wrapped__)
    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            Hub("org/other").loaded()
    assert (tried, asked) == ([1, 1], [local, local])


def test_a_hub_id_that_is_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(UserError, match=r"model=local model\.path=gpt2"):
        Hub("gpt2")
