"""Tasks of EleutherAI's lm-evaluation-harness on the model in memory."""

import hashlib
import io
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.common.cache import Cache, sources
from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.data.standard import SOURCES
from qexp.eval.against_float import changes
from qexp.eval.base import Evaluator, FloatModel, WithReference
from qexp.task import CausalLM, Task


class Outcome(NamedTuple):
    """Numbers by key; for each metric that is right or wrong its value of every item; what the
    model answered to every request, a log-likelihood or a text."""

    numbers: dict[str, float]
    items: dict[str, Tensor]
    answers: list[float | str]


@dataclass(frozen=True, kw_only=True)
class Harness(Evaluator):
    """Harness tasks, its prompts, metrics and standard errors as they are.

    `tasks`: names of the harness (tasks, groups, tags), or tasks of one's own as in its yaml files.
    `shots`: examples before each item (null: as each task says). `limit`: the first items of each
    task. `batch_size`: inputs that go through the model at once, or trees of inputs with as many
    tokens; part of the definition, because the last digits of a log-likelihood depend on it.
    `bootstrap`: rounds of the harness's bootstrap for metrics whose standard error has no formula.
    `source`: `local` files below `folder` (null: QEXP_DATA_DIR), the `hub`, or `auto`: local files
    where they are. `against_float`: also count the items that quantization turns from right to
    wrong and from wrong to right.
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
            raise UserError(f"eval {self.name}: tasks is empty; give names of harness tasks")
        for key, least in (("limit", 1), ("shots", 0), ("batch_size", 1), ("bootstrap", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"eval {self.name}: {key} {value} must be at least {least}")
        if self.source not in SOURCES:
            raise UserError(
                f"eval {self.name}: source {self.source!r} is none of {', '.join(SOURCES)}"
            )

    def check(self, task: Task) -> None:
        self._loaded  # noqa: B018 - whether the harness is installed
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
            found = self.outcome(task)
            numbers = dict(found.numbers)
            before, after = self._with_groups(plain), self._with_groups(found.items)
            for name, items in after.items():
                if name in found.numbers:
                    moved = changes(before[name], items)
                    numbers |= {f"{name}_{key}": value for key, value in moved.items()}
            return numbers

        return WithReference(self, measure)

    def outcome(self, task: Task) -> Outcome:
        """What the harness says of the model."""
        self.check(task)
        from qexp.eval.harness.model import Model

        return self.outcome_of(Model(task, self.batch_size, self.name))

    def outcome_of(self, model: Any) -> Outcome:
        """What the harness says of any model of its kind."""
        said = self.ask(model)
        samples = said["samples"]
        return Outcome(
            _numbers(said["results"], said["versions"]), _items(samples), _answers(samples)
        )

    def ask(self, model: Any) -> dict[str, Any]:
        """The harness's own results."""
        tasks = self._loaded
        from lm_eval.evaluator import evaluate

        self._same_shots()
        with redirect_stdout(io.StringIO()):  # it announces every bootstrap
            return evaluate(model, tasks, limit=self.limit, bootstrap_iters=self.bootstrap)

    @property
    def higher_is_better(self) -> Collection[str]:
        tasks = self._loaded["tasks"].values()
        return {key for task in tasks for key, higher in task.higher_is_better().items() if higher}

    def definition(self) -> dict[str, Any]:
        """The version of the harness and of the tasks, and a hash of all prompts and targets:
        equal for local rows and for the hub's where these say the same."""
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
        found = (getattr(task, "files", []) for task in self._loaded["tasks"].values())
        return sorted({path for paths in found for path in paths})

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
                "`pip install -e .[eval]` brings it"
            )
        from qexp.eval.harness import tasks

        return tasks.load(self.tasks, self.source, self.folder, self.shots)

    def _with_groups(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The items of each task, and of each group those of its tasks, one after another by name:
        what comes from the cache has an order of its own."""
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
        """The sha256 of what each task asks and of what would be right."""
        self._same_shots()
        found = {}
        for name, task in self._loaded["tasks"].items():
            task.build_all_requests(limit=self.limit)
            digest = hashlib.sha256()
            for request in task.instances:
                said = [request.args, str(task.doc_to_target(request.doc))]
                digest.update(json.dumps(said, default=str).encode())
            found[name] = digest.hexdigest()
        return found

    def _same_shots(self) -> None:
        """The same examples before the same items, however often the tasks are built."""
        from qexp.eval.harness.tasks import SHOT_SEED

        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=SHOT_SEED)


def _code() -> list[ModuleType]:
    """What answers depend on; imported here because these modules import lm_eval."""
    from qexp.eval.harness import local_rows, model, scoring, tasks

    return [sys.modules[__name__], model, local_rows, scoring, tasks]


def _numbers(results: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, float]:
    """`task/metric`, or `task/filter/metric` where a task has filters; `task/version`, `/items`."""
    numbers: dict[str, float] = {}
    for task, values in results.items():
        measured = {key: value for key, value in values.items() if "," in key}
        for key, value in measured.items():
            metric, _, chosen = key.partition(",")
            place = task if chosen == "none" else f"{task}/{chosen}"
            numbers[f"{place}/{metric}"] = math.nan if value == "N/A" else float(value)
        if measured and "sample_len" in values:
            numbers[f"{task}/items"] = float(values["sample_len"])
            if isinstance(said := versions.get(task), int | float):  # groups have none
                numbers[f"{task}/version"] = float(said)
    return numbers


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
    """1 or 0 for each item in order, by the metric's key."""
    columns: dict[str, list[float]] = {}
    for task, rows in samples.items():
        for row in rows:
            place = task if row["filter"] == "none" else f"{task}/{row['filter']}"
            for metric in row["metrics"]:
                columns.setdefault(f"{place}/{metric}", []).append(row[metric])
    return {
        key: torch.tensor(column, dtype=torch.float64)
        for key, column in columns.items()
        if all(isinstance(value, int | float) and value in (0, 1) for value in column)
    }


def _answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float | str]:
    """Item by item. The harness gives a pair where it asks for greediness too."""
    found = (each for rows in samples.values() for row in rows for each in row["filtered_resps"])
    return [each[0] if isinstance(each, tuple) else each for each in found]
