"""Evaluator that runs lm-evaluation-harness tasks on the model in memory."""

import hashlib
import io
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qexp.common.cache import Cache, sources
from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.data.standard import SOURCES
from qexp.eval.against_float import changes
from qexp.eval.base import Evaluator, FloatModel, WithReference
from qexp.eval.harness.outcome import Outcome, answers_of, items_of, numbers_of
from qexp.task import CausalLM, Task


@dataclass(frozen=True, kw_only=True)
class Harness(Evaluator):
    """Harness tasks, with the harness's prompts, metrics and standard errors.

    `tasks`: names of the harness (tasks, groups, tags), or new tasks with the fields of its yaml
    files. `shots`: few-shot examples (null: each task's default). `limit`: number of items per
    task. `batch_size`: inputs per forward pass, or trees of inputs with as many tokens; part of the
    definition, because the last digits of a log-likelihood depend on it. `bootstrap`: rounds of
    the harness's bootstrap, for metrics without a formula for the standard error. `source`: `local`
    files in `folder` (null: QEXP_DATA_DIR), the `hub`, or `auto` (local files if they exist).
    `against_float`: also count items that change from right to wrong and from wrong to right.
    """

    name: str
    tasks: Sequence[str | dict[str, Any]]
    shots: int | None = None
    limit: int | None = None
    batch_size: int = 16
    bootstrap: int = 100_000
    source: str = "auto"
    folder: str | None = None
    against_float: bool = True

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(f"eval {self.name}: tasks is empty; add names of harness tasks")
        for key, least in (("limit", 1), ("shots", 0), ("batch_size", 1), ("bootstrap", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"eval {self.name}: {key} {value} must be at least {least}")
        if self.source not in SOURCES:
            raise UserError(
                f"eval {self.name}: source {self.source!r} is not one of {', '.join(SOURCES)}"
            )

    def check(self, task: Task) -> None:
        self._loaded  # noqa: B018 - raises UserError if the harness is not installed
        if not isinstance(task, CausalLM) or task.tokenizer is None:
            raise UserError(
                f"eval {self.name}: the harness needs a causal language model with a tokenizer and "
                f"this one is {task.objective}; choose eval=loss"
            )
        self._prompts  # noqa: B018 - a task that cannot be asked stops a run before any work

    def __call__(self, task: Task) -> dict[str, float]:
        return self.outcome(task).numbers

    def measure_float(self, start: FloatModel) -> Evaluator:
        if not self.against_float:
            return self

        def build() -> dict[str, Tensor]:
            return self.outcome(start.task()).items

        key = {"model": dict(start.model), "definition": self.definition(), **sources(*_code())}
        plain = Cache().get("harness", key, build)

        def measure(task: Task) -> dict[str, float]:
            outcome = self.outcome(task)
            numbers = dict(outcome.numbers)
            before, after = self._with_groups(plain), self._with_groups(outcome.items)
            for name, items in after.items():
                if name in outcome.numbers:
                    changed = changes(before[name], items)
                    numbers |= {f"{name}_{key}": value for key, value in changed.items()}
            return numbers

        return WithReference(self, measure)

    def outcome(self, task: Task) -> Outcome:
        """The harness's results for the model."""
        self.check(task)
        from qexp.eval.harness.model import Model

        return self.outcome_of(Model(task, self.batch_size, self.name))

    def outcome_of(self, model: Any) -> Outcome:
        """The harness's results for any model with the harness's interface."""
        results = self.ask(model)
        samples = results["samples"]
        return Outcome(
            numbers_of(results["results"], results["versions"]),
            items_of(samples),
            answers_of(samples),
        )

    def ask(self, model: Any) -> dict[str, Any]:
        """The dictionary that the harness's `evaluate` returns."""
        tasks = self._loaded
        from lm_eval.evaluator import evaluate

        self._same_shots()
        with redirect_stdout(io.StringIO()):  # the harness prints a line per bootstrap
            return evaluate(model, tasks, limit=self.limit, bootstrap_iters=self.bootstrap)

    @property
    def decodes(self) -> bool:
        tasks = self._loaded["tasks"].values()
        return any(task.OUTPUT_TYPE == "generate_until" for task in tasks)

    @property
    def higher_is_better(self) -> Collection[str]:
        tasks = self._loaded["tasks"].values()
        return {key for task in tasks for key, higher in task.higher_is_better().items() if higher}

    def definition(self) -> dict[str, Any]:
        """The versions of the harness and of the tasks, and a hash of all prompts and targets.

        The hash is the same for local files and for the hub if their rows are equal.
        """
        tasks: Mapping[str, Any] = self._loaded["tasks"]
        return {
            "kind": "Harness",
            "lm_eval": version("lm_eval"),
            "batch_size": self.batch_size,
            "limit": self.limit,
            "bootstrap": self.bootstrap,
            "tasks": {
                name: {
                    "version": task.VERSION,
                    "shots": task.get_config("num_fewshot"),
                    "sha256": self._prompts[name],
                }
                for name, task in sorted(tasks.items())
            },
        }

    def files(self) -> list[Path]:
        by_task = (getattr(task, "files", []) for task in self._loaded["tasks"].values())
        return sorted({path for paths in by_task for path in paths})

    def reads(self) -> list[tuple[Corpus, str]]:
        """None that a recipe could name: the tasks have files of their own."""
        return []

    def judged(self) -> str:
        return "tasks of the harness"

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        if find_spec("lm_eval") is None:
            raise UserError(
                f"eval {self.name}: lm-evaluation-harness is not installed; "
                "install it with `pip install -e .[eval]`"
            )
        from qexp.eval.harness import tasks

        return tasks.load(self.tasks, self.source, self.folder, self.shots)

    def _with_groups(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The items of each task, and of each group the items of its tasks concatenated by name.

        Sorting makes cached and new items comparable: the cache does not keep the order.
        """
        joined: dict[str, list[Tensor]] = {key: [each] for key, each in items.items()}
        for name, group in self._loaded["groups"].items():
            members = {id(task) for task in group.get_all_tasks()}
            for key, each in sorted(items.items()):
                task, _, metric = key.partition("/")
                if id(self._loaded["tasks"][task]) in members:
                    joined.setdefault(f"{name}/{metric}", []).append(each)
        return {key: torch.cat(parts) for key, parts in joined.items()}

    @cached_property
    def _prompts(self) -> dict[str, str]:
        """The SHA-256 of each task's prompts and targets."""
        self._same_shots()
        hashes = {}
        for name, task in self._loaded["tasks"].items():
            task.build_all_requests(limit=self.limit)
            digest = hashlib.sha256()
            for request in task.instances:
                prompt = [request.args, str(task.doc_to_target(request.doc))]
                digest.update(json.dumps(prompt, default=str).encode())
            hashes[name] = digest.hexdigest()
        return hashes

    def _same_shots(self) -> None:
        """Resets the few-shot seed, so that an item gets the same examples in every build."""
        from qexp.eval.harness.tasks import SHOT_SEED

        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=SHOT_SEED)


def _code() -> list[ModuleType]:
    """The modules that answers depend on; imported here because they import lm_eval."""
    from qexp.eval.harness import local_rows, model, outcome, scoring, tasks

    return [sys.modules[__name__], model, local_rows, outcome, scoring, tasks]
