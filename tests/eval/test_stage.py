"""The evaluations of one model: windows that two of them share go through it once."""

from pathlib import Path

import pytest
import torch
from helpers.protocols import changed, llama, protocol, start

from qexp.eval import token_losses
from qexp.eval.against_float import AgainstFloat
from qexp.eval.stage import evaluate
from qexp.runs.provenance import Provenance

pytestmark = pytest.mark.usefixtures("own_cache")


def test_shared_windows_go_through_the_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = protocol("held_out", length=32, limit=6)
    other = protocol("held_out", name="other", length=32, limit=4)
    distance = AgainstFloat(name="against_float", protocol=windows)  # type: ignore[arg-type]
    evaluators = [windows, other, distance.measure_float(start(llama(), tmp_path))]
    task = changed(0.05)
    passed = []
    hidden = task.hidden
    monkeypatch.setattr(task, "hidden", lambda ids: (passed.append(len(ids)), hidden(ids))[1])
    alone = {}
    for evaluator in evaluators:
        alone |= {f"{evaluator.name}/{key}": each for key, each in evaluator(task).items()}
    assert sum(passed) == 6 + 4 + 6
    passed.clear()
    assert evaluate(evaluators, task, Provenance({})) == alone  # bit for bit
    assert sum(passed) == 6 + 4  # batches of other sizes are not shared
    passed.clear()
    monkeypatch.setattr(token_losses, "SHARED", 0)
    assert evaluate(evaluators, task, Provenance({})) == alone
    assert sum(passed) == 6 + 4 + 6
    passed.clear()
    assert evaluate([windows], task, Provenance({})).items() <= alone.items()
    with torch.no_grad():
        next(iter(task.model.parameters())).mul_(1.01)
    assert evaluate([windows, windows], task, Provenance({})) != alone  # nothing outlives a stage
