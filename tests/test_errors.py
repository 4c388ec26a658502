"""Settings that are refused as they are built, in a sentence that names the key."""

from math import inf, nan
from types import SimpleNamespace

import pytest

from qexp.errors import UserError, known, real, whole


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
