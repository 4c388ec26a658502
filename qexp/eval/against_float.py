"""Quantized against float model: KL divergence, agreement and loss change per token or item."""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from qexp import task as tasks
from qexp.common.cache import Cache, sources
from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.eval import token_losses
from qexp.eval.base import Evaluator, FloatModel, WithReference
from qexp.eval.loop import measured
from qexp.eval.token_losses import Batch, Window, batched, check_causal, states, targets
from qexp.eval.windowed import Windowed, ratio
from qexp.task import CausalLM, Task

# Bootstrap rounds for the standard error of the percentile.
ROUNDS = 200


@dataclass(frozen=True, kw_only=True)
class AgainstFloat(Evaluator):
    """Compares next-token distributions with the float model's on the windows of a perplexity.

    The float model runs once. Only its final hidden states are stored ([tokens, width]); a copy of
    the float head recomputes its logits from them exactly.
    """

    name: str
    protocol: Windowed

    def check(self, task: Task) -> None:
        check_causal(task, self.name)

    def __call__(self, task: Task) -> dict[str, float]:
        raise UserError(f"eval {self.name}: it needs the float model too; run it through `qexp`")

    def measure_float(self, start: FloatModel) -> Evaluator:
        task = start.task()
        windows = self._windows(task)

        def build() -> dict[str, Tensor]:
            check_causal(task, self.name)

            def step(batch: Batch) -> Tensor:
                assert isinstance(task, CausalLM)
                return states(task, batch).flatten(0, 1).cpu()

            return {"hidden": torch.cat(measured(task, self.name, self._batches(windows), step))}

        key = {
            "model": dict(start.model),
            "protocol": self.protocol.definition(),
            "batch_tokens": self.protocol.batch_tokens,
            **sources(token_losses, tasks),
        }
        hidden = Cache().get("hidden", key, build)["hidden"]
        head = copy.deepcopy(task.model.get_submodule(task.arch.head))
        return WithReference(self, lambda task: self._compare(task, windows, hidden, head))

    @property
    def higher_is_better(self) -> Collection[str]:
        return ("agreement",)

    def definition(self) -> dict[str, Any]:
        return {"kind": "AgainstFloat", "protocol": self.protocol.definition()}

    def followed(self, task: Task) -> dict[str, Any]:
        return self.protocol.followed(task)

    def files(self) -> list[Path]:
        return self.protocol.files()

    def reads(self) -> list[tuple[Corpus, str]]:
        return self.protocol.reads()

    def _windows(self, task: Task) -> list[Window]:
        return [window for part in self.protocol.passages(task) for window in part.windows]

    def _batches(self, windows: list[Window]) -> list[Batch]:
        return list(batched(windows, self.protocol.batch_tokens))

    def _compare(
        self,
        task: Task,
        windows: list[Window],
        hidden: Float[Tensor, "positions width"],
        head: nn.Module,
    ) -> dict[str, float]:
        check_causal(task, self.name)
        ends = [0, *accumulate(window.scored for window in windows)]

        def step(batch: Batch) -> Float[Tensor, "measures positions"]:
            assert isinstance(task, CausalLM)
            new = states(task, batch).flatten(0, 1)
            place = slice(ends[batch.first], ends[batch.first + len(batch.windows)])
            old = hidden[place].to(new.device)
            aims = targets(batch).to(new.device).split(task.positions)
            chunks = zip(task.logits(old, head), task.logits(new), aims, strict=True)
            return torch.cat([compare(*chunk) for chunk in chunks], dim=1).cpu()

        parts = measured(task, self.name, self._batches(windows), step)
        if not (measures := torch.cat(parts, dim=1).double()).isfinite().all():
            raise UserError(
                f"eval {self.name}: a logit is not finite: the model's weights or activations "
                "contain NaN or infinity"
            )
        return summary(measures, [window.scored for window in windows])


MEASURES = ("kl", "agreement", "right_to_wrong", "wrong_to_right", "loss_change")


def compare(
    old: Float[Tensor, "positions vocabulary"],
    new: Float[Tensor, "positions vocabulary"],
    targets: Int64[Tensor, " positions"],
) -> Float[Tensor, "measures positions"]:
    """MEASURES per position from the logits of the float (`old`) and the quantized model (`new`).

    They are KL(old ‖ new) in nats; whether the top-1 tokens agree; whether top-1 changed from right
    to wrong, and from wrong to right; new minus old loss in nats.
    """
    p, q = old.log_softmax(-1), new.log_softmax(-1)
    before, after = old.argmax(-1), new.argmax(-1)
    was, now = before == targets, after == targets
    change = (p - q).gather(1, targets[:, None])[:, 0]
    kl = (p.exp() * (p - q)).sum(-1)
    flags = torch.stack([before == after, was & ~now, now & ~was]).float()
    return torch.cat([kl[None], flags, change[None]])


def summary(measures: Float[Tensor, "measures positions"], scored: list[int]) -> dict[str, float]:
    """Means over tokens and the 99th percentile of the loss change.

    `scored`: scored tokens per window. Standard errors are over windows, from `ratio` for means
    and from a bootstrap for the percentile.
    """
    units = torch.tensor(scored, dtype=torch.float64)
    numbers: dict[str, float] = {}
    for name, values in zip(MEASURES, measures, strict=True):
        totals = torch.stack([part.sum() for part in values.split(scored)])
        mean, error = ratio(totals, units)
        numbers |= {name: float(mean), f"{name}_stderr": float(error)}
    changed = measures[-1].split(scored)
    numbers["loss_change_p99"] = percentile(measures[-1], 0.99)
    numbers["loss_change_p99_stderr"] = _bootstrap(changed)
    return {**numbers, "windows": float(len(scored)), "tokens": float(sum(scored))}


def _bootstrap(windows: tuple[Float[Tensor, " _"], ...]) -> float:
    if len(windows) == 1:
        return math.nan
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(windows), (ROUNDS, len(windows)), generator=generator)
    percentiles = [
        percentile(torch.cat([windows[index] for index in row.tolist()]), 0.99) for row in drawn
    ]
    return float(torch.tensor(percentiles, dtype=torch.float64).std())


def percentile(values: Float[Tensor, " values"], share: float) -> float:
    """Linear interpolation, as numpy does (torch.quantile is limited to 16 million values)."""
    at = share * (len(values) - 1)
    low = math.floor(at)
    few = values.topk(len(values) - low).values  # in descending order
    lower = float(few[-1])
    upper = float(few[-2]) if len(few) > 1 else lower
    return lower + (at - low) * (upper - lower)


def changes(before: Float[Tensor, " items"], after: Float[Tensor, " items"]) -> dict[str, float]:
    """Shares of items that changed from right (1) to wrong (0) and back, and the mean change.

    Each comes with its standard error over items (paired).
    """
    columns = {
        "right_to_wrong": before * (1 - after),
        "wrong_to_right": after * (1 - before),
        "change": after - before,
    }
    numbers: dict[str, float] = {}
    for name, values in columns.items():
        mean, error = ratio(values, torch.ones_like(values))
        numbers |= {name: float(mean), f"{name}_stderr": float(error)}
    return numbers
