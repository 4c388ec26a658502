"""A few texts as the float model and the quantized one go on: to look at."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.common.progress import bar
from qexp.data.corpus import Corpus
from qexp.data.tokens import encode_now
from qexp.eval.base import Evaluator, FloatModel, WithReference
from qexp.eval.windowed import ratio
from qexp.task import CausalLM, Task

FILE = "continuations.md"
PARTING = " ‖ "


@dataclass(frozen=True, kw_only=True)
class Continuations(Evaluator):
    """Greedy continuations of `length` tokens, float beside quantized, in continuations.md.

    `prompts`: texts (null: the first `prompt_tokens` tokens of `count` places spread over the
    text). The numbers: how many tokens agree before the first difference, and the share of
    continuations that are the same throughout.
    """

    name: str
    corpus: Corpus
    split: str
    prompts: Sequence[str] | None = None
    count: int = 4
    prompt_tokens: int = 32
    length: int = 48

    def __call__(self, task: Task) -> dict[str, float]:
        raise UserError(f"eval {self.name}: compares two models; run it through `qexp`")

    def check(self, task: Task) -> None:
        if not isinstance(task, CausalLM) or task.tokenizer is None:
            raise UserError(
                f"eval {self.name}: only a causal language model with a tokenizer continues a text"
            )

    def measure_float(self, start: FloatModel) -> Evaluator:
        task = start.task()
        self.check(task)
        tokenizer = task.tokenizer
        assert isinstance(task, CausalLM) and tokenizer is not None
        prompts = self._prompts(tokenizer)

        def build() -> dict[str, Tensor]:
            found = self._continue(task, prompts)
            return {str(index): tokens for index, tokens in enumerate(found)}

        key = {"model": dict(start.model), "definition": self.definition()}
        kept = Cache().get("continuations", key, build)
        plain = [kept[str(index)] for index in range(len(prompts))]

        def measure(task: Task) -> dict[str, float]:
            changed = self._continue(task, prompts)
            agreed = [_agreed(a, b) for a, b in zip(plain, changed, strict=True)]
            text = page(tokenizer, prompts, plain, changed, agreed)
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
        found = [ids[start : start + self.prompt_tokens] for start in starts]
        if not found or len(found[-1]) < self.prompt_tokens:
            raise UserError(
                f"eval {self.name}: the {self.split} split of {self.corpus.name} has {len(ids)} "
                f"tokens: too few for {self.count} prompts of {self.prompt_tokens}"
            )
        return found

    def _continue(self, task: Task, prompts: list[list[int]]) -> list[Int64[Tensor, " tokens"]]:
        """One by one: nothing is padded, so no neighbour changes a text."""
        assert task.tokenizer is not None
        end = task.tokenizer.eos_token_id
        found = []
        for prompt in bar(prompts, self.name):
            ids = torch.tensor([prompt], device=task.device)
            with torch.no_grad():
                made = task.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.length,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=end,
                )
            found.append(made[0, len(prompt) :].cpu())
        return found


def page(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Tensor],
    changed: Sequence[Tensor],
    agreed: Sequence[int],
) -> str:
    """Markdown: each prompt, then both continuations, with a mark where they part."""
    parts = [
        "# Continuations",
        f"Greedy. `{PARTING.strip()}` stands where float and quantized part.",
    ]
    for index, (prompt, a, b, same) in enumerate(
        zip(prompts, plain, changed, agreed, strict=True), start=1
    ):
        parts.append(f"## {index}\n\n{_quoted(tokenizer.decode(prompt))}")
        for title, tokens in (("float", a), ("quantized", b)):
            text = tokenizer.decode(tokens[:same])
            if same < len(tokens):
                text += PARTING + tokenizer.decode(tokens[same:])
            parts.append(f"**{title}**\n\n{_quoted(text)}")
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """As code, so that nothing in it is taken for markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _agreed(one: Tensor, other: Tensor) -> int:
    """How many first tokens are the same."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()
    return int(differs[0]) if len(differs) else count
