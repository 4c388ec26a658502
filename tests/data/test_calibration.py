"""Calibration recipes against plain restatements of what the papers' code does."""

import logging
import random

import pytest
import torch
from helpers.models import CONF, tiny
from omegaconf import OmegaConf
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.tokenizer_hash import fingerprint
from qexp.data.calibration import Calibration
from qexp.data.corpus import Corpus
from qexp.data.generated import Generated
from qexp.data.python_docs import PythonDocs
from qexp.data.recipe import NoCalibration
from qexp.data.synthetic import Synthetic
from qexp.data.tokens import encode
from qexp.task import TASKS, Task

pytestmark = pytest.mark.usefixtures("own_cache")


def task_of(family: str) -> Task:
    objectives = {"bert": "masked_lm", "vit": "image_classification"}
    return TASKS[objectives.get(family, "causal_lm")](*tiny(family)[:2]).eval()


def recipe(choice: str, corpus: Corpus, **fields: object) -> Calibration:
    """conf/calibration/<choice>.yaml on another corpus, in small."""
    node = OmegaConf.load(CONF / "calibration" / f"{choice}.yaml")
    del node._target_, node.corpus
    settings = OmegaConf.create({"seed": 0, "calibration": node}).calibration
    return Calibration(corpus, **{**settings, **fields})


def test_first_is_the_head_of_the_text() -> None:
    task = task_of("llama")
    [batch] = recipe("first", PythonDocs(), sequences=5, length=64)(task)
    ids = task.tokenizer(PythonDocs().text("train"))["input_ids"]
    assert batch["input_ids"].tolist() == [ids[64 * i : 64 * i + 64] for i in range(5)]


@pytest.mark.parametrize(("choice", "join"), [("wikitext2_gptq", "\n\n"), ("wikitext2_billm", " ")])
def test_wikitext_recipes(choice: str, join: str) -> None:
    task, corpus = task_of("llama"), Synthetic(count=20)
    [batch] = recipe(choice, corpus, sequences=7, length=32, seed=3)(task)
    ids = task.tokenizer(join.join(corpus.documents("train")))["input_ids"]
    random.seed(3)
    for row in batch["input_ids"].tolist():
        start = random.randint(0, len(ids) - 32 - 1)
        assert row == ids[start : start + 32]


class Uneven(Synthetic):
    """Documents of different lengths, most of them too short."""

    def documents(self, split: str) -> list[str]:
        return [text[: 13 * i] for i, text in enumerate(super().documents(split)[:40])]


def test_c4_recipe() -> None:
    task, corpus = task_of("llama"), Uneven()
    [batch] = recipe("c4_gptq", corpus, sequences=9, length=300, seed=1)(task)
    documents = corpus.documents("train")
    random.seed(1)
    for row in batch["input_ids"].tolist():
        while True:
            ids = task.tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) >= 300:
                break
        start = random.randint(0, len(ids) - 300 - 1)
        assert row == ids[start : start + 300]


def test_pile_recipe() -> None:
    task, corpus = task_of("llama"), Uneven()
    [batch] = recipe("pileval_awq", corpus, sequences=6, length=200, split="validation")(task)
    documents = corpus.documents("validation")
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_dict({"text": documents}).shuffle(seed=42)["text"]
    kept = [
        ids for text in shuffled if 0 < len(ids := task.tokenizer(text.strip()).input_ids) <= 200
    ]
    ids = [token for document in kept[:6] for token in document]
    assert batch["input_ids"].tolist() == [
        ids[200 * i : 200 * i + 200] for i in range(len(ids) // 200)
    ]


def test_seeds_change_random_recipes_only() -> None:
    task = task_of("llama")
    for choice, same in (("wikitext2_gptq", False), ("first", True)):
        drawn = [
            recipe(choice, Synthetic(), sequences=4, length=16, seed=seed)(task)[0]["input_ids"]
            for seed in (0, 1)
        ]
        assert torch.equal(*drawn) is same


def test_a_short_text_gives_fewer_windows_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    corpus = Synthetic(count=1, words=30)
    with caplog.at_level(logging.WARNING):
        [batch] = recipe("first", corpus, length=32)(task_of("llama"))
    found = len(corpus.text("train")) // 32
    assert batch["input_ids"].shape == (found, 32)
    assert "calibration.sequences=32" in caplog.text and f"only {found} windows" in caplog.text


@pytest.mark.parametrize("choice", ["first", "wikitext2_gptq", "c4_gptq"])
@pytest.mark.parametrize("words", [0, 5])
def test_too_short_or_empty_is_an_error(choice: str, words: int) -> None:
    with pytest.raises(UserError, match="length"):
        recipe(choice, Synthetic(count=1, words=words), length=512)(task_of("llama"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampling": "last"}, "calibration.sampling"),
        ({"bos": "end"}, "calibration.bos"),
        ({"sequences": 0}, "calibration.sequences"),
        ({"length": 1}, "calibration.length"),
    ],
)
def test_wrong_fields_are_named(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe("first", Synthetic(), **fields)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_windows_longer_than_the_context_are_refused_unread(family: str, monkeypatch) -> None:
    task = task_of(family)
    monkeypatch.setattr(Synthetic, "documents", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"calibration\.length: 4096 tokens, .* 2048 positions"):
        recipe("first", Synthetic(), length=4096)(task)


def test_masked_batches() -> None:
    task = task_of("bert")
    calibration = recipe("first", Synthetic(), sequences=16, length=64)
    [batch] = calibration(task)
    masked = batch["labels"] != -100
    assert 0.10 < masked.float().mean() < 0.20 and masked.any(dim=1).all()
    assert (batch["input_ids"][masked] == task.tokenizer.mask_token_id).all()
    whole = batch["input_ids"].where(~masked, batch["labels"])
    assert (
        whole.flatten().tolist()
        == encode(task.tokenizer, Synthetic().text("train"))[: 16 * 64].tolist()
    )
    assert torch.equal(calibration(task)[0]["labels"], batch["labels"])
    assert task.loss(batch).isfinite()


def test_image_batches() -> None:
    task = task_of("vit")
    [batch] = recipe("first", Synthetic(), sequences=6)(task)
    assert batch["pixel_values"].shape == (6, 3, 32, 32) and batch["labels"].shape == (6,)
    assert task.loss(batch).isfinite()
    with pytest.raises(UserError, match="data=cifar10"):
        recipe("first", PythonDocs())(task)


def test_a_model_without_tokenizer_takes_synthetic_ids() -> None:
    task = task_of("llama")
    task.tokenizer = None
    [batch] = recipe("first", Synthetic(), sequences=3, length=16)(task)
    assert batch["input_ids"].shape == (3, 16)
    for choice, corpus in (("first", PythonDocs()), ("c4_gptq", Synthetic())):
        with pytest.raises(UserError, match=r"no tokenizer|has none"):
            recipe(choice, corpus)(task)


def test_no_calibration_is_empty() -> None:
    assert NoCalibration()(task_of("llama")) == []


def test_tokens_come_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = task_of("llama").tokenizer
    first = encode(tokenizer, "some text")
    monkeypatch.setattr("qexp.data.tokens.encode_now", lambda *args: pytest.fail("tokenised again"))
    assert torch.equal(encode(tokenizer, "some text"), first)
    with pytest.raises(pytest.fail.Exception):
        encode(tokenizer, "some text", special=True)


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    one, other = task_of("llama").tokenizer, task_of("gpt2").tokenizer
    assert fingerprint(one) == fingerprint(other)  # the byte tokenizer of all tiny models
    other.add_tokens(["whole"])
    assert fingerprint(one) != fingerprint(other)


def test_the_definition_holds_the_content() -> None:
    one, other = (recipe("first", Synthetic(seed)).definition() for seed in (0, 1))
    assert one["corpus"] != other["corpus"]
    assert one["split"] == "train" and one["sequences"] == 32


def test_shuffled_windows_are_all_of_the_text_or_a_share(caplog: pytest.LogCaptureFixture) -> None:
    task, corpus = task_of("llama"), PythonDocs()

    def windows(**fields: object) -> Tensor:
        made = Calibration(corpus, "train", "shuffled", **fields)
        return made(task)[0]["input_ids"]

    whole, tenth, other = windows(share=1.0), windows(share=0.1), windows(share=0.1, seed=1)
    ids = encode(task.tokenizer, corpus.text("train"))
    count = len(ids) // 512
    assert whole.shape == (count, 512) and len(tenth) == round(count / 10)
    assert sorted(whole.tolist()) == sorted(ids[: count * 512].reshape(count, 512).tolist())
    assert torch.equal(tenth, whole[: len(tenth)]) and not torch.equal(tenth, other)
    assert not caplog.records and torch.equal(windows(sequences=3), whole[:3])
    with pytest.raises(UserError, match="sampling=shuffled"):
        Calibration(corpus, share=0.5)


def test_generated_text_is_the_model_s_own() -> None:
    """The first tokens are all different, the next are the likeliest, the rest follow the seed."""
    task = task_of("llama")
    settings = {"sequences": 12, "length": 10, "together": 5}
    [batch] = Generated(**settings)(task)
    ids = batch["input_ids"]
    assert ids.shape == (12, 10)
    assert ids[:, 0].unique().numel() == 4 and torch.equal(ids[0, 0], ids[2, 0])
    with torch.no_grad():
        likely = task.model(ids).logits.argmax(-1)[:, :-1] == ids[:, 1:]
    for row, until in enumerate((3, 4, 5) * 4):
        assert likely[row, : until - 1].all()
    assert not likely[:, 4:].all()
    greedy = Generated(**settings, top_k=1)(task)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(task.model(greedy).logits.argmax(-1)[:, :-1], greedy[:, 1:])
    assert not torch.equal(Generated(**settings, seed=1)(task)[0]["input_ids"], ids)
    with pytest.raises(UserError, match="corpus"):
        Generated(**settings)(task_of("bert"))


def test_generated_text_is_kept_under_the_weights_it_came_from(monkeypatch) -> None:
    task, recipe = task_of("llama"), Generated(4, 8)
    first = recipe(task)[0]["input_ids"]
    calls = []
    plain = Generated._continue
    monkeypatch.setattr(Generated, "_continue", lambda *a: calls.append(1) or plain(*a))
    assert torch.equal(recipe(task)[0]["input_ids"], first) and not calls
    task.model.get_input_embeddings().weight.data.mul_(1.5)
    assert recipe(task)[0]["input_ids"].shape == (4, 8) and calls
