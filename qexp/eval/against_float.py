"""What quantization changes, token by token and item by item, against the float model."""

import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
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
from qexp.eval.token_losses import Window, check_causal, states
from qexp.eval.windowed import Windowed, ratio
from qexp.task import CausalLM, Task

# Resamplings of the windows for the standard error of the percentile.
ROUNDS = 200


@dataclass(frozen=True, kw_only=True)
class AgainstFloat(Evaluator):
    """The next-token distribution against the float model's, on the windows of a perplexity.

    Exact, from one float pass: its final hidden states are kept, a width per token, and its logits
    are made again from them by a copy of the float head.
    """

    name: str
    protocol: Windowed

    def check(self, task: Task) -> None:
        check_causal(task, self.name)

    def __call__(self, task: Task) -> dict[str, float]:
        raise UserError(f"eval {self.name}: compares two models; run it through `qexp`")

    def measure_float(self, start: FloatModel) -> Evaluator:
        task = start.task()
        windows = self._windows(task)

        def build() -> dict[str, Tensor]:
            found = [hidden.flatten(0, 1) for _, hidden in self._states(task, windows)]
            return {"hidden": torch.cat([part.cpu() for part in found])}

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

    def _states(
        self, task: Task, windows: list[Window]
    ) -> Iterator[tuple[list[Window], Float[Tensor, "windows scored width"]]]:
        return states(task, windows, self.protocol.batch_tokens, self.name)

    def _compare(
        self,
        task: Task,
        windows: list[Window],
        hidden: Float[Tensor, "positions width"],
        head: nn.Module,
    ) -> dict[str, float]:
        parts: list[Float[Tensor, "measures positions"]] = []
        at = 0
        with torch.no_grad():
            for batch, now in self._states(task, windows):
                assert isinstance(task, CausalLM)
                targets = torch.cat([w.tokens[-w.scored :] for w in batch]).to(now.device)
                new = now.flatten(0, 1)
                old = hidden[at : at + len(new)].to(now.device)
                at += len(new)
                logits = task.logits(old, head), task.logits(new), targets.split(tasks.POSITIONS)
                parts += [compare(*chunk).cpu() for chunk in zip(*logits, strict=True)]
        if not (found := torch.cat(parts, dim=1).double()).isfinite().all():
            raise UserError(
                f"eval {self.name}: a logit is not a finite number: NaN or infinity is in the "
                "model's weights or activations"
            )
        return summary(found, [window.scored for window in windows])


MEASURES = ("kl", "agreement", "right_to_wrong", "wrong_to_right", "loss_change")


def compare(
    old: Float[Tensor, "positions vocabulary"],
    new: Float[Tensor, "positions vocabulary"],
    targets: Int64[Tensor, " positions"],
) -> Float[Tensor, "measures positions"]:
    """MEASURES of each position: KL(old ‖ new) in nats; whether the first choices are the same;
    whether the old one was the target and the new one is not, and the reverse; new less old loss.
    """
    p, q = old.log_softmax(-1), new.log_softmax(-1)
    before, after = old.argmax(-1), new.argmax(-1)
    was, now = before == targets, after == targets
    change = (p - q).gather(1, targets[:, None])[:, 0]
    kl = (p.exp() * (p - q)).sum(-1)
    flags = torch.stack([before == after, was & ~now, now & ~was]).float()
    return torch.cat([kl[None], flags, change[None]])


def summary(found: Float[Tensor, "measures positions"], scored: list[int]) -> dict[str, float]:
    """Means over tokens and the 99th percentile of the loss change, with standard errors over
    windows: of a ratio of sums, and of a bootstrap for the percentile."""
    units = torch.tensor(scored, dtype=torch.float64)
    numbers: dict[str, float] = {}
    for name, values in zip(MEASURES, found, strict=True):
        totals = torch.stack([part.sum() for part in values.split(scored)])
        mean, error = ratio(totals, units)
        numbers |= {name: float(mean), f"{name}_stderr": float(error)}
    changed = found[-1].split(scored)
    numbers["loss_change_p99"] = percentile(found[-1], 0.99)
    numbers["loss_change_p99_stderr"] = _bootstrap(changed)
    return {**numbers, "windows": float(len(scored)), "tokens": float(sum(scored))}


def _bootstrap(windows: tuple[Float[Tensor, " _"], ...]) -> float:
    if len(windows) == 1:
        return math.nan
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(windows), (ROUNDS, len(windows)), generator=generator)
    found = [
        percentile(torch.cat([windows[index] for index in row.tolist()]), 0.99) for row in drawn
    ]
    return float(torch.tensor(found, dtype=torch.float64).std())


def percentile(values: Float[Tensor, " values"], share: float) -> float:
    """Between neighbours in proportion, as numpy's (torch.quantile stops at 16 million values)."""
    at = share * (len(values) - 1)
    low = math.floor(at)
    few = values.topk(len(values) - low).values  # the largest, in falling order
    lower = float(few[-1])
    upper = float(few[-2]) if len(few) > 1 else lower
    return lower + (at - low) * (upper - lower)


def changes(before: Float[Tensor, " items"], after: Float[Tensor, " items"]) -> dict[str, float]:
    """Shares of items that went from right (1) to wrong (0) and back, and the change of the mean
    item by item, each with its standard error over items."""
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
