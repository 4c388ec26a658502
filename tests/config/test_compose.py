"""Every file of conf/ composes into a configuration with a signature."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from helpers.choices import CONF, choices, holder, together
from hydra import compose
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.common.errors import UserError
from qexp.config import messages
from qexp.config.instantiate import instantiate
from qexp.runs.signature import signature

pytestmark = pytest.mark.usefixtures("configured")


@pytest.mark.parametrize("words", together(), ids=" ".join)
def test_files_compose(words, monkeypatch) -> None:
    monkeypatch.setenv("QEXP_DATA_DIR", "given")
    cfg = compose("config", words)
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "given")
    assert len(signature(cfg)) == 8
    for key in ("model", "data", "calibration", "weight", "activation", "kv", "method"):
        assert "_target_" in cfg[key], f"conf/{key} has a choice that names no class"


def test_no_file_is_left_out() -> None:
    composed = {word for words in together() for word in words}
    for choice in choices():
        group, _, name = choice.partition("=")
        assert set(holder(group, name)) <= composed


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """The nodes of a yaml that name a class or function of ours, as they are written."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and str(node.get("_target_")).startswith("qexp."):
        yield node
    for child in children:
        yield from targets(child)


def switches(target: str) -> dict[str, Any]:
    """The fields that are true or false, or null too."""
    found = get_object(target)
    hints = get_type_hints(found)
    fields = [each.name for each in dataclasses.fields(found)] if isinstance(found, type) else []
    return {name: hints[name] for name in fields if hints[name] in (bool, bool | None)}


FILES = sorted(CONF.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_what_is_true_or_false_is_nothing_else(path: Path) -> None:
    for node in targets(OmegaConf.to_container(OmegaConf.load(path))):
        if not dataclasses.is_dataclass(get_object(node["_target_"])):
            continue
        for name, kind in switches(node["_target_"]).items():
            given = node.get(name, True)
            assert isinstance(given, kind) or str(given).startswith("${"), f"{path}: {name}"
            for wrong in ("maybe", 1, *([] if kind is not bool else [None])):
                cfg = OmegaConf.create({"some": [{"_target_": node["_target_"], name: wrong}]})
                with pytest.raises(UserError) as refusal:
                    instantiate(cfg.some)
                assert str(refusal.value) == f"some[0].{name}={wrong}: give true or false."


def test_the_targets_have_switches() -> None:
    """Else the test above would hold of nothing."""
    nodes = [n for path in FILES for n in targets(OmegaConf.to_container(OmegaConf.load(path)))]
    names = {node["_target_"] for node in nodes}
    found = {name for name in names if dataclasses.is_dataclass(get_object(name))}
    assert {"qexp.grid.IntGrid", "qexp.solvers.gptq.GPTQ", "qexp.training.trainer.Trainer"} <= found
    assert sum(bool(switches(name)) for name in found) > 20


@pytest.mark.parametrize(
    ("node", "overrides", "key"),
    [
        ("weight", [], "weight.symmetric"),
        ("method", ["method=gptq"], "weight.symmetric"),  # the method's grid is ${weight}
        ("method", ["method=gptq"], "method.solver.act_order"),
        ("method", ["method=gptq"], "method.hessian.sequential"),
        ("method", ["method=lsq"], "trainer.recompute"),
        ("method", ["method=lsq", "activation=int8_tensor"], "activation.dynamic"),
        ("eval", ["eval=hf_strided"], "eval.hf_strided.tail"),
    ],
)
def test_a_switch_is_named_where_it_stands(node, overrides, key) -> None:
    cfg = compose("config", [*overrides, f"{key}=maybe"])
    with pytest.raises(UserError) as refusal:
        instantiate(cfg.eval.hf_strided if node == "eval" else cfg[node])
    assert str(refusal.value) == f"{key}=maybe: give true or false."


def test_the_choices_of_a_configuration_differ() -> None:
    first, second = compose("config", ["method=rtn"]), compose("config", ["method=gptq"])
    assert signature(first) != signature(second)
    assert signature(compose("config", ["logger=none"])) == signature(compose("config"))


@pytest.mark.parametrize("choice", ["stories260k", "small_gpt2", "smollm2"])
def test_where_the_data_folder_is_does_not_count(choice, monkeypatch) -> None:
    seen = set()
    for folder in ("one", "another"):
        monkeypatch.setenv("QEXP_DATA_DIR", folder)
        seen.add(signature(compose("config", [f"model={choice}", "data=wikitext2"])))
    assert len(seen) == 1


def test_an_experiment_may_change_any_key(tmp_path: Path) -> None:
    experiment = tmp_path / "experiment"
    experiment.mkdir()
    (experiment / "mine.yaml").write_text("# @package _global_\nseed: 7\nweight:\n  bits: 3\n")
    cfg = compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert (cfg.seed, cfg.weight.bits) == (7, 3)


@pytest.mark.parametrize(
    ("override", "meant"),
    [("weight.bit=3", "weight.bits"), ("sede=1", "seed"), ("model=smolm2", "smollm2")],
)
def test_a_misspelling_is_refused_with_the_nearest_name(override, meant) -> None:
    with pytest.raises(HydraException) as error:
        compose("config", [override])
    assert f"did you mean {meant}?" in messages.message_for(error.value)


def test_far_from_everything_all_names_are_listed() -> None:
    assert messages.nearest("xyz", ["rtn", "gptq"]) == "choose from gptq, rtn"


def test_an_environment_variable_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.delenv("QEXP_DATA_DIR", raising=False)
    with pytest.raises(OmegaConfBaseException) as error:
        signature(compose("config", ["model=local", "model.path=${oc.env:QEXP_DATA_DIR}/mine"]))
    assert messages.message_for(error.value).endswith(
        "set the environment variable QEXP_DATA_DIR, or this key"
    )


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_eight_bit_floats_have_a_scale_per_row(kind) -> None:
    cfg = compose("config", [f"weight=fp8_{kind}"])
    assert cfg.weight.group_size is None and cfg.weight.per_tensor is False


def test_llm_qat_has_its_own_step() -> None:
    cfg = compose("config", ["method=llm_qat", "kv=llm_qat"])
    assert cfg.weight.symmetric and cfg.weight.narrow and cfg.weight.group_size is None
    assert cfg.kv.grid.symmetric and cfg.kv.grid.narrow
    assert not compose("config", ["method=lsq"]).weight.narrow
