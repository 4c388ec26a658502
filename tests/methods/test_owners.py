"""Runs of two and four processes: the numbers of one, a process that dies, and what is resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import pairs
from helpers.pipeline import PPL, run
from safetensors.torch import load_file

from qexp.common import collectives, ranks
from qexp.common.errors import UserError
from qexp.methods.blockwise import Blockwise
from qexp.packed import weights_file
from qexp.walk.capture import divided

pytestmark = pytest.mark.usefixtures("configured", "own_cache")

MODEL = "model=tiny_llama"
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
STATIC = ["method=rtn", "weight.bits=8", "activation=int8_tensor"]
JOBS = {
    "gptq": ["method=gptq"],
    "gptq at once": ["method=gptq", "method.propagate=false"],
    "gptq in chunks": ["method=gptq", "method.chunk=2"],
    "gptaq": ["method=gptaq"],
    "spqr": ["method=spqr"],
    "oac": ["method=oac"],
    "oac sampled": ["method=oac", "method.hessian.labels=sampled"],
    "awq": ["method=rtn", "transform=awq"],
    "smooth": [*STATIC, "transform=smooth", "transform.alpha=[0.3,0.5,0.7]"],
    "ranges": STATIC,
    "histograms": [*STATIC, "activation/grid/range=mse"],
    "averages": [*STATIC, "activation/grid/range=moving_average"],
    "one sequence": ["method=gptq", "calibration.sequences=1"],
}
QUICK = ("gptq", "histograms")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def cases() -> list:
    return [job if job in QUICK else pytest.param(job, marks=pytest.mark.slow) for job in JOBS]


@pytest.mark.parametrize("job", cases())
def test_two_processes_give_the_numbers_of_one(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [MODEL, *JOBS[job], "eval=[held_out,against_float]"]
    words += ["eval.against_float.protocol.length=32", "eval.against_float.protocol.limit=5"]
    compare(words, 2, tmp_path, monkeypatch)


@pytest.mark.slow
def test_four_processes_give_the_numbers_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in ("gptq", "spqr", "oac", "awq", "ranges"):
        words = [MODEL, *JOBS[job], "+eval.held_out.batch_tokens=64"]  # four batches
        compare(words, 4, tmp_path / job, monkeypatch)


def compare(words: list[str], count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in one process, and in `count` with a cache of their own: metrics and codes are equal,
    but for ties of OAC."""
    several = [f"trainer.devices={count}", "trainer.strategy=ddp"]
    alone = run(folder / "alone", *words)
    with monkeypatch.context() as own:
        own.setenv("QEXP_CACHE_DIR", str(folder / "cache of several"))
        together = pairs.together(lambda: run(folder / "together", *words, *several), count)
    assert together.keys() == alone.keys()
    provenance = json.loads((folder / "together" / "provenance.json").read_text())
    assert provenance["processes"] == count
    if "method=oac" in words:
        # Gradients are summed in another order, which can decide a tie: between two codes, or at
        # the threshold of outliers.
        forms = [weights_file.load(folder / each)[0] for each in ("alone", "together")]
        one, all_ = (torch.cat([f.dequantize().flatten() for f in e.values()]) for e in forms)
        assert torch.isclose(one, all_, rtol=1e-4, atol=1e-6).double().mean() > 0.999
        assert together[PPL] == pytest.approx(alone[PPL], rel=1e-2)
        return
    assert together[PPL] == pytest.approx(alone[PPL], rel=1e-6)
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-7, nan_ok=True)
    one, all_ = weights(folder / "alone"), weights(folder / "together")
    assert one.keys() == all_.keys()
    for name, tensor in one.items():
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(all_[name], tensor, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(all_[name], tensor), name


def test_each_linear_is_solved_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    write = Blockwise._write

    def counted(self: Blockwise, names: list[str], *args: object) -> list:
        solved.extend(names)
        return write(self, names, *args)

    monkeypatch.setattr(Blockwise, "_write", counted)

    def work() -> list[list[str]]:
        seen = []
        monkeypatch.setattr(
            collectives, "synchronize", lambda _: seen.append(collectives.gathered(solved))
        )
        run(tmp_path, MODEL, "method=gptq", *TWO)
        return seen[-1]

    first, second = pairs.together(work)
    assert not set(first) & set(second)
    assert len(first) + len(second) == 3 * 7 and min(len(first), len(second)) >= 6


def test_a_dead_process_ends_the_run_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = [MODEL, "method=gptq", *TWO]
    whole = run(tmp_path / "whole", MODEL, "method=gptq")
    write = Blockwise._write

    def dying(self: Blockwise, names: list[str], *args: object) -> list:
        if ranks.rank() and ".1." in names[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, names, *args)

    monkeypatch.setattr(Blockwise, "_write", dying)
    with pytest.raises(UserError, match=r"^trainer\.devices=2: another process of the run ended"):
        pairs.together(lambda: run(tmp_path / "run", *words))
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr(Blockwise, "_write", write)

    def again() -> tuple[dict[str, float], str]:
        return run(tmp_path / "run", *words), caplog.text

    with caplog.at_level("INFO"):
        resumed, said = pairs.together(again)
    assert "taken up again at block 1 of 3" in said
    assert resumed[PPL] == pytest.approx(whole[PPL], rel=1e-6)


def test_an_error_of_one_process_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Blockwise._write

    def failing(self: Blockwise, names: list[str], *args: object) -> list:
        if ranks.rank():
            raise UserError("of the second")
        return write(self, names, *args)

    monkeypatch.setattr(Blockwise, "_write", failing)
    with pytest.raises(UserError, match=r"^of the second$"):
        pairs.together(lambda: run(tmp_path, MODEL, "method=gptq", *TWO))


def test_sequences_are_divided_once() -> None:
    rows = [{"x": torch.arange(start, start + 5)} for start in (0, 5, 10)]
    for count in (2, 3, 4, 7, 15):
        parts = [torch.cat([b["x"] for b in divided(rows, rank, count)]) for rank in range(count)]
        assert torch.cat(parts).tolist() == list(range(15))
        assert count > 3 or all(len(part) % 5 == 0 for part in parts)  # whole batches


COMMAND = [MODEL, "data=synthetic", "method=gptq", "model.sizes.num_hidden_layers=40"]
COMMAND += ["calibration.sequences=8", "calibration.length=64", "weight.group_size=32", "threads=1"]
COMMAND += ["eval.held_out.length=32", "eval.held_out.limit=4", "progress=false", "logger=none"]


@pytest.mark.slow
def test_the_command_starts_its_processes_and_survives_the_loss_of_one(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    place = {"PYTHONPATH": root, "QEXP_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "qexp", *COMMAND, *words],
            cwd=tmp_path,
            env={**os.environ, **place},
            stderr=subprocess.PIPE,
            text=True,
        )

    alone = start()
    said = alone.communicate(timeout=500)[1]
    assert alone.returncode == 0, said
    [path] = tmp_path.glob("outputs/*/metrics.json")
    expected = json.loads(path.read_text())
    killed = start(*TWO)
    while killed.poll() is None and len(list(tmp_path.glob("cache/blocks/*.safetensors"))) < 2:
        time.sleep(0.05)
    [other] = psutil.Process(killed.pid).children()
    other.kill()
    said = killed.communicate(timeout=500)[1]
    assert killed.returncode == 1 and "Traceback" not in said
    assert "trainer.devices=2: 1 of the other processes ended (exit code -9" in said
    again = start(*TWO)
    said = again.communicate(timeout=500)[1]
    assert again.returncode == 0 and "taken up again at block" in said, said
    [path] = [each for each in tmp_path.glob("outputs/*/metrics.json") if each != path]
    found = json.loads(path.read_text())
    # a code at a tie changes all of the 40 random blocks behind it
    assert found["weight/error"] == pytest.approx(expected["weight/error"], rel=0.05)
    assert found["weight/bits"] == expected["weight/bits"]
