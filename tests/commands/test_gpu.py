"""The page of an accelerator, on the simulated one."""

import json
from xml.etree import ElementTree

import pytest
from helpers import pairs
from helpers.simulated_device import simulated
from hydra.core.global_hydra import GlobalHydra

from qexp.commands import gpu
from qexp.commands.bench.sizes import Sizes
from qexp.commands.gpu.page import TITLES, page
from qexp.commands.gpu.suite import counts
from qexp.commands.gpu.training import distributed
from qexp.common.errors import UserError

TINY = ["--hidden=16", "--intermediate=32", "--heads=2", "--kv-heads=2", "--vocabulary=264"]
TINY += ["--blocks=2", "--sequences=2", "--length=16", "--group=16", "--steps=2"]


@pytest.fixture(autouse=True)
def free(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))  # put back afterwards
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in gpu.PARTS if name != "tests"])
def test_a_part_runs_on_the_simulated_device(part, tmp_path, capsys) -> None:
    words = [*TINY, f"--parts={part}", f"--out={tmp_path}"]
    with simulated():
        code = pairs.apart(lambda: gpu.main(words))  # has a process group
    result = json.loads((tmp_path / "gpu.json").read_text())
    measured = result["parts"][part]
    if part == "distributed":  # a process group needs a backend of the device, which no test has
        assert "failed" not in measured["auto"] and code == 1
        for strategy in ("ddp", "fsdp"):
            assert "sim" in measured[strategy]["failed"]
    else:
        assert code == 0, measured
    assert result["simulated"] and result["device"] == "sim"
    written = (tmp_path / "gpu.md").read_text()
    assert "(simulated)" in written and TITLES[part] in written
    assert not any(word in written for word in ("seconds", "GB", "per second"))
    if part == "replay":
        assert measured["equal to the CPU, of all weights"] == 1


@pytest.mark.slow
def test_each_strategy_trains_in_one_process() -> None:
    sizes = Sizes(16, 32, 2, 2, 264, blocks=1, sequences=2, length=16)
    found = pairs.apart(lambda: distributed(sizes, "cpu"))
    assert [*found] == ["auto", "ddp", "fsdp"]
    assert all(each["seconds"] > 0 for each in found.values()), found


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> dict:
        raise RuntimeError("no memory\nfor this")

    parts = {"solving": fail, "replay": lambda *_: {"columns": 3, "seconds": 1.5}}
    monkeypatch.setattr(gpu, "PARTS", parts)
    with simulated():
        assert gpu.main([*TINY, "--parts=solving,replay", f"--out={tmp_path}"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert found == {"solving": {"failed": "RuntimeError: no memory"}, "replay": {"columns": 3}}


def test_after_the_time_no_part_begins(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"replay": lambda *_: pytest.fail("began")})
    with simulated():
        gpu.main([*TINY, "--parts=replay", "--minutes=0", f"--out={tmp_path}"])
    assert "0.0 minutes were over" in (tmp_path / "gpu.md").read_text()


def test_wrong_words_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no accelerator here"):
        gpu.main([f"--out={tmp_path}"])
    with simulated(), pytest.raises(UserError, match="--parts speed: is unknown"):
        gpu.main(["--parts=speed", f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_a_page_has_units_and_each_column_once() -> None:
    result = {
        **{"simulated": False, "seconds": 12.0, "versions": {"torch": "2"}},
        **{"git": {"revision": "ab"}, "sizes": {"hidden": 8}},
        "numerics": {"device": "NVIDIA X", "tf32": False},
        "parts": {
            "solving": {
                "product": {"side": 8.0, "bfloat16 rate": 5e14},
                "gptq, 1 block": {"seconds": 2.5, "bytes": 5_800_000_000, "share": 0.25},
            }
        },
    }
    text = page(result)
    assert "# One accelerator: NVIDIA X" in text and "in 12 s" in text
    assert "| | side | bfloat16 rate, 10¹² operations / s | seconds | GB | % of peak |" in text
    assert "| gptq, 1 block |  |  | 2.5 | 5.8 | 25 |" in text


def test_failed_tests_are_named() -> None:
    report = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
    <testcase classname="a.b" name="one"><failure/></testcase>
    <testcase classname="a.b" name="two"/></testsuite></testsuites>"""
    assert counts(ElementTree.fromstring(report)) == {
        **{"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": "a.b.one"}
    }
