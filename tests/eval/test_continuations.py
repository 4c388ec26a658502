"""Greedy continuations of the float and the quantized model."""

from pathlib import Path

import pytest
import torch
from helpers.protocols import CORPUS, changed, llama, start

from qexp.common.errors import UserError
from qexp.eval.continuations import FILE, Continuations
from qexp.task import CausalLM

pytestmark = pytest.mark.usefixtures("own_cache")


def continuations(**fields: object) -> Continuations:
    settings = {"count": 3, "prompt_tokens": 10, "length": 12} | fields
    return Continuations(name="continuations", corpus=CORPUS, split="test", **settings)


def greedy(task: CausalLM, prompt: str, length: int) -> list[int]:
    ids = task.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(task.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == task.tokenizer.eos_token_id:
                break
    return ids[len(task.tokenizer(prompt)["input_ids"]) :]


def test_the_same_model_goes_on_the_same(tmp_path: Path) -> None:
    task = llama()
    found = continuations().measure_float(start(task, tmp_path))(task)
    assert found["identical"] == 1 and found["prompts"] == 3
    text = (tmp_path / FILE).read_text()
    assert text.count("## ") == 3 and text.count("**float**") == text.count("**quantized**") == 3
    assert text.count("‖") == 1  # the legend's


def test_texts_part_where_the_tokens_do(tmp_path: Path) -> None:
    plain, other = llama(), changed(0.1)
    prompt = "the cat sat on"
    found = continuations(prompts=[prompt]).measure_float(start(plain, tmp_path))(other)
    a, b = greedy(plain, prompt, 12), greedy(other, prompt, 12)
    agreed = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    assert agreed < 12 and found["agreed_tokens"] == agreed and found["identical"] == 0
    text = (tmp_path / FILE).read_text()
    assert f"    {prompt}" in text and text.count("‖") == 3


def test_the_float_texts_are_made_once(tmp_path: Path) -> None:
    plain, other = llama(), changed(0.1)
    once = continuations().measure_float(start(plain, tmp_path))(other)
    plain.model.generate = lambda **_: pytest.fail("measured twice")
    assert continuations().measure_float(start(plain, tmp_path))(other) == pytest.approx(
        once, nan_ok=True
    )


def test_wrong_input_is_named(tmp_path: Path) -> None:
    task = llama()
    with pytest.raises(UserError, match="too few"):
        continuations(prompt_tokens=10**6).measure_float(start(task, tmp_path))
    with pytest.raises(UserError, match="needs the float model"):
        continuations()(task)
