"""Mixtures of recipes: all their sequences, their texts, and unequal lengths."""

import pytest
import torch
from helpers.models import task_of

from qexp.common.errors import FieldError, UserError
from qexp.data.calibration import Calibration
from qexp.data.mixture import Mixture
from qexp.data.synthetic import Synthetic


def part(seed: int, sequences: int, length: int = 16) -> Calibration:
    return Calibration(Synthetic(seed), sequences=sequences, length=length)


def test_a_mixture_holds_the_sequences_of_its_parts():
    one, two = part(0, 3), part(1, 5)
    task, mixture = task_of(), Mixture({"one": one, "two": two})
    found = torch.cat([batch["input_ids"] for batch in mixture(task)])
    apart = [recipe(task)[0]["input_ids"] for recipe in (one, two)]
    assert torch.equal(found, torch.cat(apart)) and len(found) == 8
    assert mixture.definition()["parts"] == {"one": one.definition(), "two": two.definition()}
    assert mixture.reads() == [*one.reads(), *two.reads()]


def test_parts_of_different_lengths_are_refused():
    mixture = Mixture({"one": part(0, 2), "two": part(1, 2, length=8)})
    with pytest.raises(UserError, match=r"parts\.two: .*same length"):
        mixture(task_of())
    with pytest.raises(FieldError, match="at least one recipe"):
        Mixture({})
