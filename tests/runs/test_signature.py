"""One configuration, one folder."""

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import qexp
from qexp.common import hashes
from qexp.common.numerics import Numerics
from qexp.runs import resolvers
from qexp.runs.signature import UNSIGNED, signature

CONFIG = {"seed": 0, "weight": {"bits": 4}, "method": {"grid": "${weight}"}, "kv": None}


def of(**changes: object) -> str:
    return signature(OmegaConf.create({**CONFIG, **changes}))


def test_it_is_eight_hex_digits_that_stay() -> None:
    assert of() == of() == "dd5d234c"


def test_numerics_at_their_defaults_leave_it_as_older_runs_have_it() -> None:
    defaults = asdict(Numerics())
    assert of(numerics=defaults) == of(numerics={}) == of()
    assert len({of(), *(of(numerics={**defaults, key: True}) for key in defaults)}) == 5


def test_the_order_of_keys_does_not_matter() -> None:
    assert signature(OmegaConf.create(dict(reversed(CONFIG.items())))) == of()


@pytest.mark.parametrize("key", sorted(UNSIGNED))
def test_what_cannot_change_a_number_stays_out(key) -> None:
    assert of(**{key: {"some": "thing"}}) == of()


def test_everything_else_counts_through_interpolations() -> None:
    resolved = {**CONFIG, "method": {"grid": {"bits": 4}}}
    assert signature(OmegaConf.create(resolved)) == of()
    assert len({of(), of(seed=1), of(weight={"bits": 3}), of(kv={"bits": 8})}) == 4


def test_the_resolver_asks_from_inside_the_configuration() -> None:
    resolvers.register()
    cfg = OmegaConf.create({**CONFIG, "hydra": {"run": {"dir": "outputs/${sig:}"}}})
    assert cfg.hydra.run.dir == f"outputs/{of()}"


def test_a_class_counts_by_its_name_wherever_its_module_is() -> None:
    old = of(weight={"_target_": "qexp.grid.IntGrid", "ranges": [{"_target_": "a.b.MSE"}]})
    moved = of(weight={"_target_": "qexp.grids.integer.IntGrid", "ranges": [{"_target_": "MSE"}]})
    other = of(weight={"_target_": "qexp.grid.LevelGrid", "ranges": [{"_target_": "a.b.MSE"}]})
    assert old == moved != other


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(MissingMandatoryValue):
        of(data={"path": "???"})


def test_the_fingerprint_covers_the_whole_package() -> None:
    assert Path(qexp.__file__).parent == hashes.PACKAGE


def test_code_is_told_by_names_and_contents(tmp_path) -> None:
    (tmp_path / "a.py").write_text("one")
    first = hashes.of(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing that runs")
    assert hashes.of(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = hashes.of(tmp_path)
    (tmp_path / "b.py").write_text("two")
    assert len({first, second, hashes.of(tmp_path)}) == 3
    assert len(hashes.code()) == 16
