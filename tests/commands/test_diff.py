"""Differences of two runs, and nothing else."""

import json
from pathlib import Path

import pytest
from helpers.folders import folder

from qexp.commands import diff
from qexp.common.errors import UserError
from qexp.runs.finished import load


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """RTN at 3 bits and GPTQ at 4; `up` is five times better in the second, `down` in it alone."""
    return [
        folder(tmp_path, "rtn", 3, errors={"up": 0.5, "same": 0.1}),
        folder(tmp_path, "gptq", 4, errors={"up": 0.1, "same": 0.1, "down": 0.2}, damp=0.1),
    ]


def line(text: str, name: str) -> list[str]:
    [found] = [each.split() for each in text.splitlines() if each.split()[:1] == [name]]
    return found[1:]


def test_only_what_differs_is_shown(pair, capsys) -> None:
    diff.main([str(folder) for folder in pair])
    said = capsys.readouterr().out
    assert line(said, "method") == ["rtn", "gptq"]
    assert line(said, "weight.bits") == ["3", "4"]
    assert line(said, "method.damp") == ["-", "0.1"]
    assert line(said, "held_out/ppl") == ["37.00", "36.00", "-1"]
    assert line(said, "weight/bits") == ["3.50", "4.50", "+1"]
    assert line(said, "up") == ["0.5", "0.1", "0.2"]
    assert line(said, "down") == ["-", "0.2000", "-"]
    for name in ("model", "seed", "label", "same", "held_out/ppl_stderr", "versions.torch"):
        assert f"\n{name} " not in said
    assert "code, versions, machine, inputs: nothing differs" in said


def test_definitions_that_differ_have_no_difference(pair) -> None:
    path = pair[1] / "provenance.json"
    content = json.loads(path.read_text())
    content["protocols"]["held_out"]["digest"] = "another0"
    content["versions"]["torch"] = "0.0"
    path.write_text(json.dumps(content))
    said = "\n".join(diff.report(*map(load, pair)))
    assert "not comparable" in " ".join(line(said, "held_out/ppl"))
    assert line(said, "versions.torch")[1] == "0.0"


def test_a_run_does_not_differ_from_itself(pair) -> None:
    run = load(pair[0])
    sections = [each for each in diff.report(run, run) if each]
    assert len(sections) == 4 and all("nothing differs" in each for each in sections)


def test_what_is_no_finished_run_is_refused(pair) -> None:
    (pair[1] / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"has no metrics\.json"):
        diff.main([str(folder) for folder in pair])
