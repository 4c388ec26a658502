"""Settings that are refused as they are built, in a sentence that names the key."""

from dataclasses import asdict
from math import inf, nan
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from qexp.common.errors import (
    FieldError,
    UserError,
    check_bool,
    check_choice,
    check_finite,
    check_int,
    check_number,
    check_positive,
)
from qexp.common.numerics import Numerics
from qexp.config import location, root_keys
from qexp.config.instantiate import instantiate


@pytest.mark.parametrize("value", [-1, -0.5, nan, "much", None, True])
def test_what_is_no_number_that_large(value: object) -> None:
    with pytest.raises(UserError) as refusal:
        check_number("method.solver", SimpleNamespace(damp=value), damp=0)
    assert str(refusal.value) == f"method.solver.damp={value}: give a number, 0 or more."


@pytest.mark.parametrize("value", [0, 1.0, 2.5, "4", None, True])
def test_what_is_no_whole_number_that_large(value: object) -> None:
    with pytest.raises(UserError) as refusal:
        check_int("method", SimpleNamespace(chunk=value), chunk=1)
    assert str(refusal.value) == f"method.chunk={value}: give a whole number, 1 or more."


def test_words_and_what_may_be() -> None:
    settings = SimpleNamespace(a=0, b=0.5, c=inf, d=3, e="this")
    check_number("here", settings, a=0, b=0, c=0, d=3)
    check_int("here", settings, a=0, d=3)
    check_choice("here", settings, e=("this", "that"))
    with pytest.raises(UserError, match=r"^here\.e=this is unknown: give that or those\.$"):
        check_choice("here", settings, e=("that", "those"))


@pytest.mark.parametrize("value", [-1.0, nan, inf, True, "much"])
def test_what_is_not_finite_or_below_0(value: object) -> None:
    for check, right in (
        (check_finite, "a finite number, 0 or more"),
        (check_positive, "a finite number ab"),
    ):
        with pytest.raises(UserError, match=rf"^here\.rate={value}: give {right}"):
            check("here", SimpleNamespace(rate=value), "rate")
    check_finite("here", SimpleNamespace(rate=0), "rate")
    with pytest.raises(UserError):
        check_positive("here", SimpleNamespace(rate=0), "rate")


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_what_is_no_switch(value: object) -> None:
    with pytest.raises(UserError, match=rf"^here\.fast={value}: give true or false\.$"):
        check_bool("here", SimpleNamespace(fast=value), "fast")


def test_a_field_of_an_object_that_may_stand_anywhere_is_named_where_it_stands() -> None:
    with pytest.raises(FieldError, match=r"^delta=-1\.0: give"):
        instantiate({"_target_": "qexp.gradients.EWGS", "delta": 0.1}).__class__(-1.0)
    node = {
        "_target_": "qexp.quantizers.fake_quantize.FakeQuantize",
        "rounding": {"_target_": "qexp.gradients.EWGS"},
    }
    node["rounding"]["delta"] = -1.0
    with pytest.raises(UserError, match=r"^rounding\.delta=-1\.0: give a finite number"):
        instantiate(OmegaConf.create(node))


ROOT = {
    **{"seed": 0, "device": "auto", "offload": False, "run": None, "progress": True},
    **{"save_weights": True, "threads": None, "optimize": "ppl", "label": None, "kind": None},
    **{"dry_run": False, "retry": None, "fail_fast": False, "records": None},
    **{"memory": 2, "replay": False, "numerics": asdict(Numerics())},
}


@pytest.mark.parametrize(
    ("key", "values", "right"),
    [
        *((key, ["maybe", 1, None], "give true or false") for key in root_keys.SWITCHES),
        ("seed", [-1, 1.5, "x", True, 2**32], "give a whole number from 0 to"),
        ("threads", [-2, 0, 1.5, "x", True], "give a whole number, 1 or more"),
        ("memory", [-1, "x", True], "give a number, 0 or more"),
        ("device", [3, None, True], "give cpu"),
        ("run", [3, True, ["a"]], "give the folder of a finished run"),
        ("label", [["a"], {"a": 1}], "give a word"),
        ("kind", [["a"], {"a": 1}], "give a word"),
        ("records", [3, True, ["a"]], "give the folder of records"),
        ("optimize", [3, True, ["ppl", 3]], "give the name of a metric"),
        ("retry", ["x", True, 1], "give failed"),
    ],
)
def test_what_a_key_of_the_root_cannot_be(key: str, values: list[object], right: str) -> None:
    for value in values:
        with pytest.raises(UserError) as refusal:
            root_keys.check(OmegaConf.create(ROOT | {key: value}))
        assert str(refusal.value).startswith(f"{key}={value}: {right}")


@pytest.mark.parametrize(
    "good",
    [
        {
            "threads": 2,
            "run": "outputs/x",
            "label": "x",
            "kind": "y",
            "retry": "failed",
            "device": "cuda:1",
        },
        {"optimize": ["ppl", "bits"], "label": 3, "offload": True, "seed": 2**32 - 1},
        {"optimize": None, "records": "docs/records", "memory": None, "replay": True},
    ],
)
def test_what_keys_of_the_root_can_be(good: dict[str, object]) -> None:
    root_keys.check(OmegaConf.create(ROOT | good))


def test_the_root_is_that_of_the_configuration() -> None:
    cfg = OmegaConf.load(location.conf() / "config.yaml")
    assert set(cfg) == {*ROOT, "defaults", "hydra"}
    root_keys.check(cfg)
    assert {key for key in cfg if isinstance(cfg[key], bool)} == set(root_keys.SWITCHES)
