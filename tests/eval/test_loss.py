"""The model's own loss, for models that have no perplexity."""

import math

import pytest
import torch
from helpers.models import CONF, tiny
from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.data.synthetic import Synthetic
from qexp.eval.base import digest
from qexp.eval.loss import MeanLoss
from qexp.task import TASKS, Task

pytestmark = pytest.mark.usefixtures("own_cache")


def evaluator(**fields: object) -> MeanLoss:
    data = OmegaConf.load(CONF / "data" / "synthetic.yaml")
    whole = OmegaConf.create(
        {"data": data, "seed": 0, "eval": OmegaConf.load(CONF / "eval" / "loss.yaml")}
    )
    [node] = whole.eval.values()
    node.batches.update({"sequences": 6, "length": 24})
    return instantiate(OmegaConf.merge(node, fields))


def task_of(family: str) -> Task:
    objectives = {"bert": "masked_lm", "vit": "image_classification"}
    return TASKS[objectives.get(family, "causal_lm")](*tiny(family)[:2]).eval()


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_the_mean_over_batches(family: str) -> None:
    task, measure = task_of(family), evaluator(batch_rows=3)
    [batch] = measure.batches(task)
    with torch.no_grad():
        halves = [
            float(task.loss({key: part[rows] for key, part in batch.items()}))
            for rows in (slice(0, 3), slice(3, 6))
        ]
    measured = measure(task)
    assert measured["loss"] == pytest.approx(sum(halves) / 2, rel=1e-6)
    assert measured["loss_stderr"] == pytest.approx(abs(halves[0] - halves[1]) / 2, rel=1e-4)
    assert measured["rows"] == 6


def test_it_is_defined_by_its_batches() -> None:
    one, other, third = (
        digest(evaluator(**fields).definition())
        for fields in ({}, {"batch_rows": 1}, {"batches": {"length": 25}})
    )
    assert one == other != third
    assert evaluator().name == "synthetic_held_out"


def test_nan_is_an_error() -> None:
    task = task_of("vit")
    next(task.blocks.parameters()).data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"synthetic_held_out.*NaN"):
        evaluator()(task)


def test_the_held_out_text_is_not_the_calibration_text() -> None:
    batches = evaluator().batches
    assert batches.definition()["split"] == Synthetic().evaluation_split == "test"
