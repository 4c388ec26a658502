"""Every named protocol against plain loops over full logits."""

import copy
import math
import random
import re
from weakref import ref

import pytest
import torch
from helpers.models import CONF, DECODERS, tiny
from helpers.protocols import CORPUS, full_losses, ids_of, llama, protocol

from qexp.common.errors import UserError
from qexp.data.synthetic import Synthetic
from qexp.eval.base import digest
from qexp.task import TASKS

pytestmark = pytest.mark.usefixtures("own_cache")


PROTOCOLS = sorted(
    path.stem
    for path in (CONF / "eval").glob("*.yaml")
    if "\n  _target_: qexp.eval.perplexity." in path.read_text()
)


@pytest.mark.parametrize("family", DECODERS)
def test_gptq_protocol_from_full_logits(family: str) -> None:
    """As the specification writes it: mean over 63 targets, times 64, summed, exp of the mean."""
    task = llama(family)
    measured = protocol("wikitext2_gptq_512", length=64, batch_tokens=192)(task)
    ids = ids_of(task, "\n\n".join(CORPUS.documents("test")))
    count = ids.shape[1] // 64
    total = 0.0
    for i in range(count):
        total += float(full_losses(task, ids[:, 64 * i : 64 * i + 64]).mean()) * 64
    assert measured["ppl"] == pytest.approx(math.exp(total / (count * 64)), rel=1e-5)
    assert (measured["windows"], measured["tokens"]) == (count, count * 63)


def test_held_out_takes_the_text_as_it_stands() -> None:
    task = llama()
    held_out = protocol("held_out", length=32, limit=5)
    assert held_out.name == "synthetic_raw_32x5"
    ids = ids_of(task, CORPUS.text("test"))
    losses = [float(full_losses(task, ids[:, 32 * i : 32 * i + 32]).mean()) for i in range(5)]
    measured = held_out(task)
    assert measured["ppl"] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    error = torch.tensor(losses).std() / math.sqrt(5)
    assert measured["ppl_stderr"] == pytest.approx(measured["ppl"] * float(error), rel=1e-3)
    torch.testing.assert_close(held_out.losses(task), torch.tensor(losses))
    assert [len(window) for window in held_out.token_losses(task)] == [31] * 5


@pytest.mark.parametrize("choice", ["wikitext2_gptq_512", "c4_gptq", "ptb_gptq"])
def test_a_model_of_another_dtype_than_the_papers_is_said(
    choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    named, silent = protocol(choice), protocol(choice, dtype=None)
    assert named.definition() == silent.definition()
    task = llama()
    silent.check(task)
    assert not caplog.text and silent.facts(task) == {"dtype": "float32"}
    named.check(task)
    assert "are of float16 models and this one is float32" in caplog.text
    assert named.facts(task) == {"dtype": "float32", "protocol_dtype": "float16"}
    caplog.clear()
    named.check(task.half())
    assert not caplog.text
    with pytest.raises(UserError, match="dtype 'fp16' is none of"):
        protocol(choice, dtype="fp16").check(task)


@pytest.mark.parametrize(
    ("choice", "joined"), [("ptb_gptq", "\n\n"), ("ptb_gptq_new", " "), ("c4_gptq_new", " ")]
)
def test_joins(choice: str, joined: str) -> None:
    task = llama()
    split = "test" if choice == "ptb_gptq_new" else "validation"
    fields = {"documents": 12, "limit": 6} if choice == "c4_gptq_new" else {}
    documents = CORPUS.documents(split)[: fields.get("documents")]
    ids = ids_of(task, joined.join(documents))
    count = min(ids.shape[1] // 48, fields.get("limit", 10**9))
    losses = [full_losses(task, ids[:, 48 * i : 48 * i + 48]).mean() for i in range(count)]
    measured = protocol(choice, length=48, **fields)(task)
    assert measured["ppl"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_first_c4_protocol_draws_as_gptq_does() -> None:
    task = llama()
    documents = CORPUS.documents("validation")
    random.seed(0)
    losses = []
    for _ in range(10):
        while True:
            ids = ids_of(task, documents[random.randint(0, len(documents) - 1)])
            if ids.shape[1] >= 110:
                break
        start = random.randint(0, ids.shape[1] - 110 - 1)
        losses.append(full_losses(task, ids[:, start : start + 110]).mean())
    measured = protocol("c4_gptq", length=110, count=10)(task)
    assert measured["ppl"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_strided_scores_every_token_once() -> None:
    task = llama()
    measured = protocol("hf_strided", length=64, stride=24)(task)
    ids = ids_of(task, "\n\n".join(CORPUS.documents("test")))
    total, scored, reached = 0.0, 0, 0
    for start in range(0, ids.shape[1], 24):
        end = min(start + 64, ids.shape[1])
        new = end - reached
        total += float(full_losses(task, ids[:, start:end])[-new:].sum())
        scored += min(new, end - start - 1)
        reached = end
        if end == ids.shape[1]:
            break
    assert scored == ids.shape[1] - 1 == measured["tokens"]
    assert measured["ppl"] == pytest.approx(math.exp(total / scored), rel=1e-5)


@pytest.mark.parametrize("vocabulary", ["adds BOS", "does not add it", "has none"])
def test_llamacpp_scores_the_second_half_and_asks_the_vocabulary_for_bos(vocabulary: str) -> None:
    task = llama()
    tokenizer = task.tokenizer = copy.deepcopy(task.tokenizer)
    bos, adds = tokenizer.bos_token_id, vocabulary == "adds BOS"
    ids = ids_of(task, CORPUS.text("test"))  # without BOS
    tokenizer.add_bos_token = adds
    if vocabulary == "has none":
        tokenizer.bos_token = None
    asked = protocol("llamacpp_512", length=32, context=17)
    measured = asked(task)
    assert asked.followed(task) == {"add_bos": adds}
    if adds:
        ids = torch.cat([torch.tensor([[bos]]), ids], dim=1)
    losses = []
    for i in range(ids.shape[1] // 32):
        chunk = ids[:, 32 * i : 32 * i + 32].clone()
        if adds:
            chunk[0, 0] = bos
        losses.append(full_losses(task, chunk)[16:])  # positions 16 to 30 predict 17 to 31
    assert all(len(part) == 15 for part in losses)
    assert measured["ppl"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)


def test_half_window_scores_half_of_every_window() -> None:
    task = llama()
    measured = protocol("half_window", length=32, context=16)(task)
    ids = ids_of(task, "\n\n".join(CORPUS.documents("test")))
    losses = [
        full_losses(task, ids[:, 32 * i : 32 * i + 32])[15:] for i in range(ids.shape[1] // 32)
    ]
    assert all(len(part) == 16 for part in losses)
    assert measured["ppl"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_batches_change_nothing(batch_tokens: int) -> None:
    task = llama()
    one, other = (
        protocol("hf_strided", length=64, stride=24, batch_tokens=n)(task)
        for n in (2048, batch_tokens)
    )
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("slice", [1, 7, 10**6])
def test_streamed_logits_are_the_full_ones(slice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = llama()
    expected = protocol("held_out", length=32, limit=6).token_losses(task)
    monkeypatch.setattr("qexp.task.CausalLM.positions", slice)
    found = protocol("held_out", length=32, limit=6).token_losses(task)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", PROTOCOLS)
def test_every_protocol_is_defined_by_its_content(choice: str) -> None:
    one = digest(protocol(choice).definition())
    assert re.fullmatch("[0-9a-f]{8}", one)
    assert digest(protocol(choice, batch_tokens=1).definition()) == one
    assert digest(protocol(choice, Synthetic(count=29, words=20)).definition()) != one
    assert digest(protocol(choice, length=1999).definition()) != one


def test_no_two_protocols_are_the_same() -> None:
    same = {"held_out", "wikitext2_raw_512x40"}  # on one corpus
    digests = {digest(protocol(choice).definition()) for choice in PROTOCOLS if choice not in same}
    assert len(digests) == len(PROTOCOLS) - len(same)


@pytest.mark.parametrize("choice", PROTOCOLS)
def test_a_short_text_is_an_error(choice: str) -> None:
    if choice == "lm_eval_word":
        pytest.skip("pages may be short")
    with pytest.raises(UserError, match=r"window|no document"):
        protocol(choice, Synthetic(count=1, words=4))(llama())


def test_nan_weights_are_an_error_that_names_the_protocol() -> None:
    task = llama()
    next(task.blocks.parameters()).data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"synthetic_raw_32x4.*NaN"):
        protocol("held_out", length=32, limit=4)(task)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bos": "end"}, "bos"),
        ({"context": 512}, "context"),
        ({"stride": 513}, "stride"),
        ({"limit": 0}, "limit"),
    ],
)
def test_wrong_fields_are_named(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        protocol("wikitext2_raw_512x40", **fields)


def test_models_that_cannot_be_measured_say_why() -> None:
    with pytest.raises(UserError, match="eval=loss"):
        protocol("held_out", length=16)(TASKS["masked_lm"](*tiny("bert")[:2]).eval())
    with pytest.raises(UserError, match=r"2048.*positions|positions"):
        protocol("wikitext2_gptq_2048", length=100_000)(llama("gpt2"))


def test_one_window_has_no_standard_error() -> None:
    measured = protocol("held_out", length=32, limit=1)(llama())
    assert math.isnan(measured["ppl_stderr"]) and measured["windows"] == 1


def test_logits_of_one_chunk_are_in_memory(monkeypatch) -> None:
    task, alive = llama(), []
    head = task.model.get_submodule(task.arch.head)

    def look(module, args, output) -> None:
        alive.append(sum(each() is not None for each in made))
        made.append(ref(output))

    made: list = []
    handle = head.register_forward_hook(look)
    monkeypatch.setattr("qexp.task.CausalLM.positions", 8)
    task.token_losses(torch.randn(24, task.model.config.hidden_size), torch.zeros(24).long())
    handle.remove()
    assert alive == [0, 0, 0]
