"""Settings of transforms: what cannot be is refused before any model is loaded."""

import re
from types import SimpleNamespace

import pytest
from hydra import compose

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.transforms.scale_search import check_settings

pytestmark = pytest.mark.usefixtures("configured")


ON_GRIDS = ("smooth", "awq", "os_plus", "quadapter", "omniquant")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("smooth", "alpha=[]"),
        ("smooth", "alpha=1.5"),
        ("smooth", "alpha=[0.5,-1.0]"),
        ("smooth", "alpha=nan"),
        ("smooth", "sequences=0"),
        ("awq", "points=0"),
        ("awq", "points=true"),
        ("awq", "sequences=-1"),
        ("os_plus", "points=0"),
        ("os_plus", "lowest=0.0"),
        ("os_plus", "sequences=true"),
        ("equalize", "rounds=0"),
        ("quadapter", "steps=-1"),
        ("quadapter", "batch=0"),
        ("quadapter", "rate=0.0"),
        ("quadapter", "rate=inf"),
        ("quadapter", "seed=-1"),
        ("omniquant", "epochs=0"),
        ("magr", "alpha=-1.0"),
        ("magr", "alpha=inf"),
        ("magr", "steps=-1"),
        ("magr", "sequences=0"),
        ("omniquant", "batch=false"),
        ("omniquant", "clip_rate=-1.0"),
        ("omniquant", "clip_rate=nan"),
        ("omniquant", "scale_rate=inf"),
        *((name, "sites=all") for name in (*ON_GRIDS, "equalize")),
    ],
)
def test_what_cannot_be_is_refused_before_any_model_is_loaded(name, wrong):
    cfg = compose("config", [f"transform={name}", f"transform.{wrong}"])
    with pytest.raises(UserError, match=rf"^transform\.{wrong.partition('=')[0]}=[^.]+") as refusal:
        instantiate(cfg.transform)
    assert re.search(r"give [^:;]+\.$", str(refusal.value))


def test_no_grid_and_no_switch_are_refused():
    with pytest.raises(UserError, match=r"^transform\.grid=None: .*weight=int"):
        check_settings(SimpleNamespace(grid=None, sequences=None))
    with pytest.raises(UserError, match=r"^transform\.clip=yes: give true or false"):
        instantiate(compose("config", ["transform=awq", "transform.clip=yes"]).transform)


@pytest.mark.parametrize(
    "words",
    [
        ("smooth", "transform.alpha=[0.0,0.5,1.0]"),
        ("quadapter", "transform.steps=0"),
        ("omniquant", "transform.clip_rate=0.0", "transform.sites=norms"),
        ("awq", "transform.sequences=1", "transform.points=1"),
    ],
    ids=" ".join,
)
def test_what_lies_at_an_end_is_taken(words):
    instantiate(compose("config", [f"transform={words[0]}", *words[1:]]).transform)


@pytest.mark.parametrize(
    "other",
    [*(f"weight/range={name}" for name in ("mse", "percentile", "minmax_shrunk")), "method=quip"],
)
def test_learned_clipping_needs_min_max(other):
    cfg = compose("config", ["transform=omniquant", other])
    with pytest.raises(UserError, match=r"^weight\.range=.*weight/range=minmax"):
        instantiate(cfg.transform)


def test_the_second_phases_sites_have_a_key_of_their_own():
    cfg = compose("config", ["method=quadapter", "method.sites=all"])
    with pytest.raises(UserError, match=r"^method\.sites=all is unknown"):
        instantiate(cfg.method)
