"""Adapter from a quantized model in memory to lm-evaluation-harness's model interface.

This module imports the harness; import it only where the harness is used.
"""

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qexp.common.errors import UserError
from qexp.eval.harness.scoring import Request, score
from qexp.eval.loop import measured
from qexp.task import CausalLM, Task

# New tokens for tasks that set no number, as in the harness's model `hf`.
NEW_TOKENS = 256


class Model(TemplateLM):
    """Answers requests as the harness's model `hf` does; log-softmax is in float32.

    `rows`: inputs per forward pass. The prefix before a text is BOS, else EOS. Inputs longer than
    the model's context are truncated on the left.
    """

    def __init__(self, task: Task, rows: int, name: str) -> None:
        TemplateLM.__init__(self)
        assert isinstance(task, CausalLM) and task.tokenizer is not None
        self.task, self.rows, self.name = task, rows, name
        self.tokenizer = task.tokenizer
        self.max_length = resolve_max_length(task.model.config, self.tokenizer)
        self._device = task.device
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; memoized, because the choices of an item repeat its context."""
        key = (string, add_special_tokens)
        if key not in self._encoded:
            special = add_special_tokens
            if special is None:
                prefix = self.tokenizer.decode(self.prefix_token_id)
                special = not has_bos_prefix(string, prefix)
            ids = self.tokenizer.encode(string, add_special_tokens=special, verbose=False)
            self._encoded[key] = ids
        return self._encoded[key]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        answers = TemplateLM.loglikelihood(self, requests, disable_tqdm=True)
        self._encoded.clear()
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scored = [
            Request(tuple((context + target)[-(self.max_length + 1) :]), len(target))
            for _, context, target in requests
        ]
        answers = score(self.task, scored, self.rows, self.name)
        return [(answer.loglikelihood, answer.greedy) for answer in answers]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Texts in windows of the model's context length; the last has as much context as fits."""
        owners: list[int] = []
        windows: list[tuple[Any, list[int], list[int]]] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                context, target = make_disjoint_window(window)
                owners.append(owner)
                windows.append((None, context, target))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows)
        for owner, (loglikelihood, _) in zip(owners, answers, strict=True):
            totals[owner] += loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy or sampled as the task requests; prompts of similar length form a batch."""
        order = sorted(
            range(len(requests)),
            key=lambda i: (repr(requests[i].args[1]), -len(self.tok_encode(requests[i].args[0]))),
        )
        batches: list[list[int]] = []
        for index in order:
            last = batches[-1] if batches else []
            if (
                last
                and len(last) < self.rows
                and (requests[last[0]].args[1] == requests[index].args[1])
            ):
                last.append(index)
            else:
                batches.append([index])

        def step(batch: list[int]) -> list[str]:
            prompts = [self.tok_encode(requests[i].args[0]) for i in batch]
            return self._generate(prompts, requests[batch[0]])

        texts = [""] * len(requests)
        for batch, made in zip(batches, measured(self.task, self.name, batches, step), strict=True):
            for index, text in zip(batch, made, strict=True):
                texts[index] = text
        self._encoded.clear()
        return texts

    def _generate(self, prompts: list[list[int]], like: Instance) -> list[str]:
        settings: Any = normalize_gen_kwargs(like.args[1], NEW_TOKENS)
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(settings.pop("until", None), eos=eos)
        room = self.max_length - (new := settings.pop("max_gen_toks"))
        if room < 1:
            raise UserError(
                f"eval {self.name}: {new} new tokens do not fit into this model's context of "
                f"{self.max_length}"
            )
        if settings.get("temperature") == 0.0:
            settings.pop("temperature")  # transformers warns about it when it does not sample
        width = min(max(map(len, prompts)), room)
        cut = [prompt[-width:] for prompt in prompts]
        pad = self.tokenizer.pad_token_id
        pad = self.eot_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in cut])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in cut])
        tokens = self.task.model.generate(
            input_ids=ids.to(self.task.device),
            attention_mask=mask.to(self.task.device),
            max_length=width + new,
            pad_token_id=pad,
            use_cache=True,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, width, len(cut)),
            **settings,
        )
        decoded = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, until, None) for text in decoded]
