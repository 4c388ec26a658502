"""Configurations of older runs, read with the names of today."""

from importlib import import_module

import pytest

from qexp.runs.moved import MOVED, RENAMED_FIELDS, renamed


@pytest.mark.parametrize("name", sorted({*MOVED.values(), *RENAMED_FIELDS}))
def test_every_new_name_is_there(name) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_classes_and_fields_of_an_old_configuration_get_their_new_names() -> None:
    old = {
        "weight": {"_target_": "qexp.grid.IntGrid", "range": {"_target_": "qexp.ranges.RMS"}},
        "steps": [{"_target_": "qexp.training.Trainer", "reach": 1}],
    }
    old["weight"]["range"]["reach"] = 2.4
    assert renamed(old) == {
        "weight": {
            "_target_": "qexp.grid.IntGrid",
            "range": {"_target_": "qexp.grid.ranges.RMS", "clip_at": 2.4},
        },
        "steps": [{"_target_": "qexp.training.trainer.Trainer", "reach": 1}],
    }
