"""llama2.c checkpoints: one that the test writes, and the trained one where its file is at hand."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import CONF, batches, data_dir, tiny
from omegaconf import OmegaConf
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.models.llama2c import Llama2C, sentencepiece_tokenizer

TEXT = "Once upon a time there was a little girl. She said: I am here, and I like to play!\n"
ODD = ["", " ", "  a   time ", "the end. \nOnce  upon", 'Zoë said "日本"', "a_b ▁x <s>", "\t\n\n"]

KINDS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection from rotated halves to rotated neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, shared: bool) -> Path:
    """tiny_llama in the layout of llama2.c, written from its description."""
    model = tiny("llama").model
    if shared:
        model.lm_head.weight = model.model.embed_tokens.weight
    numbers = [model.model.embed_tokens.weight]
    for kind in KINDS:
        for layer in model.model.layers:
            weight = layer.get_submodule(kind).weight
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(kind)
            numbers.append(pairs(weight, heads) if heads else weight)
    numbers += [model.model.norm.weight, torch.full((2, 32, 8), torch.nan)]
    numbers += [] if shared else [model.lm_head.weight]
    flat = torch.cat([tensor.detach().flatten() for tensor in numbers]).numpy().astype("<f4")
    header = struct.pack("<7i", 64, 128, 3, 4, 2, 264 if shared else -264, 32)
    path.write_bytes(header + flat.tobytes())
    return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A byte-pair sentencepiece model with bytes, trained on one sentence."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text(TEXT * 20)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tok"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "tok.model"


@pytest.mark.parametrize("shared", [True, False])
def test_a_written_file_is_the_model_it_was_made_from(tmp_path, pieces, shared):
    loaded = Llama2C(str(write(tmp_path / "a.bin", shared)), str(pieces)).loaded()
    original = tiny("llama").model
    if shared:
        original.lm_head.weight = original.model.embed_tokens.weight
    original.config.rms_norm_eps = 1e-5
    for norm in original.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.variance_epsilon = 1e-5
    [batch] = batches("llama", count=1)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**batch).logits, original(**batch).logits)
    tied = loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert tied == shared and not loaded.model.training


@pytest.mark.parametrize(
    ("cut", "said"), [(10, "shorter"), (1000, "truncated"), (-4, "truncated"), (0, "header")]
)
def test_a_broken_file_is_named(tmp_path, pieces, cut, said):
    path = write(tmp_path / "a.bin", True)
    content = path.read_bytes()
    path.write_bytes(content[:cut] if cut else bytes(28) + content[28:])
    with pytest.raises(UserError, match=rf"model\.path: .*a\.bin.*{said}"):
        Llama2C(str(path), str(pieces)).loaded()


def test_a_missing_file_and_a_wrong_tokenizer_are_named(tmp_path, pieces):
    path = write(tmp_path / "a.bin", True)
    with pytest.raises(UserError, match=r"model\.path: .*QEXP_DATA_DIR"):
        Llama2C(str(tmp_path / "b.bin"), str(pieces)).loaded()
    with pytest.raises(UserError, match=r"model\.tokenizer: .*a\.bin"):
        Llama2C(str(path), str(path)).loaded()


def test_a_llama2c_fingerprint_follows_both_files(tmp_path, pieces):
    path = write(tmp_path / "a.bin", True)
    source = Llama2C(str(path), str(pieces))
    before = source.fingerprint()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    changed = {key for key, value in source.fingerprint().items() if value != before[key]}
    assert changed == {"weights"} and source.files() == [path, pieces]


@pytest.mark.parametrize("text", [TEXT, *ODD])
def test_the_tokenizer_is_sentencepiece_behind_a_bos(pieces, text):
    reference = SentencePieceProcessor(model_file=str(pieces))
    tokenizer = sentencepiece_tokenizer(pieces)
    if "<s>" not in text:  # there a fast tokenizer sees the special token, sentencepiece text
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
    assert tokenizer(text).input_ids[0] == 1


# the trained checkpoints -------------------------------------------------------------------------


@pytest.mark.skipif(data_dir() is None, reason="needs QEXP_DATA_DIR")
@pytest.mark.parametrize(("name", "loss"), [("stories260k", 1.25), ("babyllama", 0.60)])
def test_a_trained_checkpoint_knows_its_stories(name, loss, monkeypatch):
    """Nats per token over the first 40 stories of the training text, each behind a BOS."""
    folder = data_dir()
    monkeypatch.setenv("QEXP_DATA_DIR", str(folder))
    source = instantiate(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    model, tokenizer, *_ = source.loaded()
    text = (folder / "tinystories" / "tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    reference = SentencePieceProcessor(model_file=str(source.files()[1]))
    assert tokenizer(text[:50_000], add_special_tokens=False).input_ids == reference.encode(
        text[:50_000]
    )
    losses, length = [], model.config.max_position_embeddings
    for story in text.split("<|endoftext|>")[:40]:
        ids = torch.tensor(tokenizer(story.strip()).input_ids)[:length]
        with torch.no_grad():
            scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
        losses += (-scores[torch.arange(len(ids) - 1), ids[1:]]).tolist()
    assert np.mean(losses) == pytest.approx(loss, abs=0.02)


@pytest.mark.skipif(data_dir() is None, reason="needs QEXP_DATA_DIR")
def test_stories260k_writes_the_story_of_its_own_test(monkeypatch):
    monkeypatch.setenv("QEXP_DATA_DIR", str(data_dir()))
    model, tokenizer, *_ = instantiate(OmegaConf.load(CONF / "model" / "stories260k.yaml")).loaded()
    ids = torch.tensor([[1]])
    with torch.no_grad():
        for _ in range(30):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    said = tokenizer.decode(ids[0, 1:])
    assert said.startswith("Once upon a time, there was a little girl named Lily. She loved to")
