"""Results of the harness as metrics, items and answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Outcome(NamedTuple):
    """The results of the harness."""

    numbers: dict[str, float]  # metrics by key
    items: dict[str, Tensor]  # for each metric with values 0 and 1, its value per item
    answers: list[float | str]  # per request, a log-likelihood or a generated text


def numbers_of(results: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, float]:
    """`task/metric`, `task/filter/metric` if a task has filters, `task/version`, `task/items`."""
    numbers: dict[str, float] = {}
    for task, values in results.items():
        measured = {key: value for key, value in values.items() if "," in key}
        for key, value in measured.items():
            metric, _, chosen = key.partition(",")
            place = task if chosen == "none" else f"{task}/{chosen}"
            numbers[f"{place}/{metric}"] = math.nan if value == "N/A" else float(value)
        if measured and "sample_len" in values:
            numbers[f"{task}/items"] = float(values["sample_len"])
            if isinstance(number := versions.get(task), int | float):  # groups have none
                numbers[f"{task}/version"] = float(number)
    return numbers


def items_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
    """By the metric's key, 1 or 0 for each item in order; other metrics are left out."""
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


def answers_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float | str]:
    """Answers in the order of items. Log-likelihood requests answer a pair (value, is greedy)."""
    resps = (each for rows in samples.values() for row in rows for each in row["filtered_resps"])
    return [each[0] if isinstance(each, tuple) else each for each in resps]
