"""Greedy continuations of prompts by the float and the quantized model, for inspection."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexp.common import collectives
from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.data.corpus import Corpus
from qexp.data.tokens import encode_now
from qexp.eval.base import Evaluator, FloatModel, WithReference
from qexp.eval.loop import measured
from qexp.eval.windowed import ratio
from qexp.task import CausalLM, Task

FILE = "continuations.md"
DIVERGENCE = " ‖ "


@dataclass(frozen=True, kw_only=True)
class Continuations(Evaluator):
    """Writes greedy continuations of `length` tokens, float and quantized, to continuations.md.

    `prompts`: texts (null: `count` prompts of `prompt_tokens` tokens at equal distances in the
    text). Metrics: the number of equal tokens before the first difference, and the share of
    continuations that are identical.
    """

    name: str
    corpus: Corpus
    split: str
    prompts: Sequence[str] | None = None
    count: int = 4
    prompt_tokens: int = 32
    length: int = 48

    def __call__(self, task: Task) -> dict[str, float]:
        raise UserError(f"eval {self.name}: it needs the float model too; run it through `qexp`")

    @property
    def decodes(self) -> bool:
        return True

    def check(self, task: Task) -> None:
        if not isinstance(task, CausalLM) or task.tokenizer is None:
            raise UserError(
                f"eval {self.name}: continuations need a causal language model with a tokenizer"
            )

    def measure_float(self, start: FloatModel) -> Evaluator:
        task = start.task()
        self.check(task)
        tokenizer = task.tokenizer
        assert isinstance(task, CausalLM) and tokenizer is not None
        prompts = self._prompts(tokenizer)

        def build() -> dict[str, Tensor]:
            return {str(index): ids for index, ids in enumerate(self._continue(task, prompts))}

        key = {"model": dict(start.model), "definition": self.definition()}
        cached = Cache().get("continuations", key, build)
        plain = [cached[str(index)] for index in range(len(prompts))]

        def measure(task: Task) -> dict[str, float]:
            changed = self._continue(task, prompts)
            agreed = [_agreed(a, b) for a, b in zip(plain, changed, strict=True)]
            text = page(tokenizer, prompts, plain, changed, agreed)
            if not collectives.rank():
                with atomic(start.folder / FILE) as path:
                    path.write_text(text, encoding="utf-8")
            same = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
            numbers = torch.tensor([agreed, same], dtype=torch.float64)
            (mean, error), (share, spread) = (ratio(x, torch.ones_like(x)) for x in numbers)
            return {
                "agreed_tokens": float(mean),
                "agreed_tokens_stderr": float(error),
                "identical": float(share),
                "identical_stderr": float(spread),
                "prompts": float(len(prompts)),
            }

        return WithReference(self, measure)

    @property
    def higher_is_better(self) -> Collection[str]:
        return ("agreed_tokens", "identical")

    def definition(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"kind": "Continuations", "length": self.length}
        if self.prompts is not None:
            return {**settings, "prompts": list(self.prompts)}
        content = {"name": self.corpus.name, "sha256": self.corpus.fingerprint(self.split)}
        places = {"count": self.count, "prompt_tokens": self.prompt_tokens}
        return {**settings, **places, "split": self.split, "corpus": content}

    def files(self) -> list[Path]:
        return [] if self.prompts is not None else self.corpus.files(self.split)

    def reads(self) -> list[tuple[Corpus, str]]:
        return [] if self.prompts is not None else [(self.corpus, self.split)]

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        if self.prompts is not None:
            return [encode_now(tokenizer, text, special=True) for text in self.prompts]
        ids = encode_now(tokenizer, self.corpus.text(self.split), special=False)
        starts = range(0, len(ids), max(1, len(ids) // self.count))[: self.count]
        prompts = [ids[start : start + self.prompt_tokens] for start in starts]
        if not prompts or len(prompts[-1]) < self.prompt_tokens:
            raise UserError(
                f"eval {self.name}: the {self.split} split of {self.corpus.name} has {len(ids)} "
                f"tokens: too few for {self.count} prompts of {self.prompt_tokens}"
            )
        return prompts

    def _continue(self, task: Task, prompts: list[list[int]]) -> list[Int64[Tensor, " tokens"]]:
        """Runs one prompt at a time: without padding, prompts cannot affect each other."""
        assert task.tokenizer is not None
        end = task.tokenizer.eos_token_id

        def step(prompt: list[int]) -> Int64[Tensor, " tokens"]:
            ids = torch.tensor([prompt], device=task.device)
            tokens = task.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.length,
                do_sample=False,
                use_cache=True,
                pad_token_id=end,
            )
            return tokens[0, len(prompt) :].cpu()

        return measured(task, self.name, prompts, step)


def page(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Tensor],
    changed: Sequence[Tensor],
    agreed: Sequence[int],
) -> str:
    """Markdown: each prompt and both continuations, with a mark at the first difference."""
    parts = [
        "# Continuations",
        f"Greedy. `{DIVERGENCE.strip()}` marks the first difference between float and quantized.",
    ]
    for index, (prompt, a, b, same) in enumerate(
        zip(prompts, plain, changed, agreed, strict=True), start=1
    ):
        parts.append(f"## {index}\n\n{_quoted(tokenizer.decode(prompt))}")
        for title, tokens in (("float", a), ("quantized", b)):
            text = tokenizer.decode(tokens[:same])
            if same < len(tokens):
                text += DIVERGENCE + tokenizer.decode(tokens[same:])
            parts.append(f"**{title}**\n\n{_quoted(text)}")
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """A code block, so that the text is not read as Markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _agreed(one: Tensor, other: Tensor) -> int:
    """The length of the common prefix."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()
    return int(differs[0]) if len(differs) else count
