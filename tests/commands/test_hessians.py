"""Traces of Hessians by position add up to those of the matrices; errors are those of the runs."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import joined, task_of
from helpers.pipeline import run
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from qexp.cli import command
from qexp.config import location
from qexp.hessian import Layerwise, OutputAdaptive, TokenWeighted
from qexp.hessian.position import KINDS, TraceByPosition
from qexp.runs import resolvers
from qexp.walk import walk

MODEL = ["model=tiny_llama", "data=synthetic", "calibration.sequences=6", "calibration.length=64"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_positions_add_up_to_the_traces(family):
    task, batch = task_of(family), joined(family)
    first = next(iter(walk(task, [batch])))
    sequences, tokens = batch["input_ids"].shape
    blocks = range(len(task.blocks))
    found = dict(TraceByPosition(tokens=tokens).measure(first, blocks))
    kinds = (Layerwise(), TokenWeighted(), OutputAdaptive())
    scales = (2 / (sequences * tokens), 1024.0**2, 1024.0**2)
    for row, (hessian, scale) in enumerate(zip(kinds, scales, strict=True)):
        for index, matrices in hessian.measure(first, blocks):
            for names, matrix in matrices.items():
                for name in names.split():
                    parts = found[index][name][0, row]
                    assert parts.shape == (tokens,)
                    assert float(parts.sum() * scale) == pytest.approx(
                        float(matrix.trace()), rel=1e-3
                    )
    for traces, squares in (each for block in found.values() for each in block.values()):
        assert (squares * sequences >= traces.square() * 0.999).all()  # Cauchy and Schwarz
        assert (traces[0, :-1] > 0).all() and (traces[1, :-1] > 0).all()
    last = found[len(blocks) - 1]
    assert all((sums[:, 1:, -1] == 0).all() for sums in last.values())  # nothing is predicted


def test_only_the_position_of_a_large_token_grows():
    task, batch = task_of("llama"), joined("llama")
    before, after = (_traces(task, batch, scale) for scale in (1.0, 30.0))
    ratio = after / before
    assert ratio[3] == pytest.approx(900, rel=1e-3)
    assert torch.allclose(ratio[:3], torch.ones(3), rtol=1e-3)


def _traces(task, batch, scale: float) -> torch.Tensor:
    """Of the first block's queries, with the input of position 3 times `scale`."""

    def larger(_, args, output):
        return torch.cat([output[:, :3], output[:, 3:4] * scale, output[:, 4:]], 1)

    handle = task.blocks[0].input_layernorm.register_forward_hook(larger)
    try:
        first = next(iter(walk(task, [batch])))
        [(_, found)] = TraceByPosition(tokens=batch["input_ids"].shape[1]).measure(first, [0])
    finally:
        handle.remove()
    return found["self_attn.q_proj"][0, 0]


@pytest.fixture
def runs(own_cache) -> Iterator[None]:
    """Hydra composes for runs; `clear` lets the command do so."""
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        yield


@pytest.mark.usefixtures("runs")
def test_the_command_gives_a_run_s_errors_in_every_metric(tmp_path, capsys):
    words = [*MODEL, "eval=none", "weight.group_size=32", "weight.bits=2", "method.propagate=false"]
    layerwise = ["method=gptq", "method.solver.damp=0.01"]
    run(tmp_path / "gptq", *words, *layerwise, small=[])
    run(tmp_path / "output", *words, *layerwise, "method/hessian=token_one_pass", small=[])
    GlobalHydra.instance().clear()
    out = tmp_path / "out"
    assert (
        command("hessians", [str(out), *(str(tmp_path / r) for r in ("gptq", "output")), *MODEL])
        == 0
    )
    rows = {row["name"]: row for row in lines(out / "layers.csv")}
    for name, kind in (("gptq", "layerwise"), ("output", "token")):
        recorded = {
            row["name"]: float(row["error"]) for row in lines(tmp_path / name / "layers.csv")
        }
        assert recorded.keys() == rows.keys()
        for layer, error in recorded.items():
            assert float(rows[layer][f"error_{kind}_{name}"]) == pytest.approx(error, rel=1e-3)
    better = sum(
        float(r["error_layerwise_gptq"]) < float(r["error_layerwise_output"]) for r in rows.values()
    )
    assert better > len(rows) / 2
    positions = lines(out / "positions.csv")
    assert len(positions) == 64
    for kind in ("layerwise", "token", "output"):
        assert sum(float(row[kind]) for row in positions) == pytest.approx(1, abs=1e-4)
    said = capsys.readouterr().out
    assert "error of output" in said
    tokens = {kind: [float(row[f"effective_{kind}"]) for row in rows.values()] for kind in KINDS}
    assert all(1 <= each <= 6 * 64 for found in tokens.values() for each in found)
    assert sum(tokens["token"]) < sum(tokens["layerwise"])  # gradients differ more than inputs
    for kind, found in tokens.items():
        mean = torch.tensor(found).log().mean().exp()
        assert f"| {mean:.0f} |" in next(x for x in said.splitlines() if x.startswith(f"| {kind}"))
    ratios = [float(row["trace_output"]) / float(row["trace_token"]) for row in rows.values()]
    mean = torch.tensor(ratios).log().mean().exp()
    assert f"trace of output / trace of token: {mean:.2f} (geometric" in said


def lines(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("runs")
def test_runs_of_other_weights_are_refused(tmp_path, capsys):
    small = [*MODEL, "eval=none", "weight.group_size=32", "method=rtn"]
    run(tmp_path / "turned", *small, "transform=rotate", small=[])
    run(tmp_path / "float", *MODEL, "eval=none", "method=none", small=[])
    run(tmp_path / "rtn", *small, small=[])
    GlobalHydra.instance().clear()
    for name, words, said in (
        ("turned", MODEL, "its weights were transformed"),
        ("float", MODEL, "it quantized no weights"),
        ("rtn", [*MODEL, "seed=1"], "its model is another one"),
    ):
        assert command("hessians", [str(tmp_path / "out"), str(tmp_path / name), *words]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
