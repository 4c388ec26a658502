"""Settings that are refused as they are built, in a sentence that names the key."""

from math import inf, nan
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from qexp.common.errors import FieldError, UserError, finite, known, positive, real, switches, whole
from qexp.config.instantiate import build


@pytest.mark.parametrize("value", [-1, -0.5, nan, "much", None, True])
def test_what_is_no_number_that_large(value: object) -> None:
    with pytest.raises(UserError) as refusal:
        real("method.solver", SimpleNamespace(damp=value), damp=0)
    assert str(refusal.value) == f"method.solver.damp={value}: give a number, 0 or more."


@pytest.mark.parametrize("value", [0, 1.0, 2.5, "4", None, True])
def test_what_is_no_whole_number_that_large(value: object) -> None:
    with pytest.raises(UserError) as refusal:
        whole("method", SimpleNamespace(chunk=value), chunk=1)
    assert str(refusal.value) == f"method.chunk={value}: give a whole number, 1 or more."


def test_words_and_what_may_be() -> None:
    settings = SimpleNamespace(a=0, b=0.5, c=inf, d=3, e="this")
    real("here", settings, a=0, b=0, c=0, d=3)
    whole("here", settings, a=0, d=3)
    known("here", settings, e=("this", "that"))
    with pytest.raises(UserError, match=r"^here\.e=this is unknown: give that or those\.$"):
        known("here", settings, e=("that", "those"))


@pytest.mark.parametrize("value", [-1.0, nan, inf, True, "much"])
def test_what_is_not_finite_or_below_0(value: object) -> None:
    for check, right in ((finite, "a finite number, 0 or more"), (positive, "a finite number ab")):
        with pytest.raises(UserError, match=rf"^here\.rate={value}: give {right}"):
            check("here", SimpleNamespace(rate=value), "rate")
    finite("here", SimpleNamespace(rate=0), "rate")
    with pytest.raises(UserError):
        positive("here", SimpleNamespace(rate=0), "rate")


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_what_is_no_switch(value: object) -> None:
    with pytest.raises(UserError, match=rf"^here\.fast={value}: give true or false\.$"):
        switches("here", SimpleNamespace(fast=value), "fast")


def test_a_field_of_an_object_that_may_stand_anywhere_is_named_where_it_stands() -> None:
    with pytest.raises(FieldError, match=r"^delta=-1\.0: give"):
        build({"_target_": "qexp.gradients.EWGS", "delta": 0.1}).__class__(-1.0)
    node = {
        "_target_": "qexp.quantizers.fake_quantize.Formula",
        "rounding": {"_target_": "qexp.gradients.EWGS"},
    }
    node["rounding"]["delta"] = -1.0
    with pytest.raises(UserError, match=r"^rounding\.delta=-1\.0: give a finite number"):
        build(OmegaConf.create(node))
