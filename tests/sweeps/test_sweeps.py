"""Sweeps of a small checkpoint that are killed, share a folder, meet full disks and launchers."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers.forked import Forks
from helpers.models import tiny
from safetensors import safe_open

from qexp.sweeps import ledger

pytestmark = pytest.mark.slow

SMALL = ["data=synthetic", "calibration=synthetic", "calibration.sequences=2"]
SMALL += ["calibration.length=32", "eval.held_out.length=32", "eval.held_out.limit=2"]
SMALL += ["weight.group_size=32", "progress=false", "logger=none", "threads=1"]
JOBS = ["method=rtn,gptq", "weight.bits=2,3,4", "seed=0,1,2,3"]  # 24
FEW = ["method=rtn,gptq", "weight.bits=2,3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on disk, with tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = tiny("llama")
    loaded.model.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def forks(tmp_path: Path) -> Iterator:
    """`forks("name")`: commands in a folder of that name, with a cache of its own."""
    made = []

    def make(name: str, **environment: str) -> Forks:
        place = {"QEXP_CACHE_DIR": str(tmp_path / f"{name}-cache"), **environment}
        made.append(Forks(tmp_path / name, place))
        return made[-1]

    yield make
    for each in made:
        each.end()


def command(checkpoint: Path, *words: str) -> list[str]:
    return ["-m", "model=local", f"model.path={checkpoint}", *SMALL, *words]


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Every finished run's numbers, by its signature."""
    paths = folder.glob("outputs/*/metrics.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def finished(folder: Path) -> dict[str, int]:
    """When each run finished; a run that is made twice finishes twice."""
    paths = folder.glob("outputs/*/metrics.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in paths}


def check_whole(folder: Path) -> None:
    """Every file can be read to its end, and none is left half-written."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if ledger.FOLDER in path.parts and path.name.startswith("."):
            continue  # a record that a killed process had not put in its place; nobody reads it
        assert ".tmp" not in path.name, path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text()) is not None
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                assert list(csv.DictReader(file))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118


def records(folder: Path) -> list[ledger.Entry]:
    top = folder / "outputs" / ledger.FOLDER  # a search keeps its storage there as well
    [sweep] = (path for path in top.iterdir() if path.is_dir())
    return ledger.Sweep(sweep, "").entries()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_survives_kills(workers: int, checkpoint: Path, forks) -> None:
    whole, killed = forks("whole"), forks("killed")
    words = command(checkpoint, *JOBS)
    start = time.perf_counter()
    assert whole.run(words) == [0]
    seconds = time.perf_counter() - start
    expected = metrics(whole.folder)
    assert len(expected) == 24

    chance = random.Random(workers)
    done: dict[str, int] = {}
    for _ in range(4):
        codes = killed.run(*[words] * workers, kill=chance.uniform(0.1, 0.35) * seconds)
        assert set(codes) <= {0, -9}
        for name, moment in done.items():
            assert finished(killed.folder)[name] == moment, f"{name} was run again"
        done = finished(killed.folder)
    assert killed.run(*[words] * workers) == [0] * workers
    for name, moment in done.items():
        assert finished(killed.folder)[name] == moment, f"{name} was run again"
    assert metrics(killed.folder) == expected
    assert [entry.status for entry in records(killed.folder)] == ["done"] * 24
    check_whole(killed.folder / "outputs")
    assert "24 jobs" in killed.said and " 0 failed" in killed.said


def test_two_processes_share_a_sweep_and_each_job_is_run_once(checkpoint: Path, forks) -> None:
    both = forks("both")
    assert both.run(*[command(checkpoint, *JOBS)] * 2) == [0, 0]
    totals = [line for line in both.said.splitlines() if line.startswith("qexp: 24 jobs")]
    ran = [int(line.split()[3]) for line in totals]
    assert len(ran) == 2 and sum(ran) == 24 and min(ran) > 0
    check_whole(both.folder / "outputs")


def test_a_full_disk_fails_jobs_whole_and_the_sweep_goes_on_later(checkpoint: Path, forks) -> None:
    full, roomy = forks("full"), forks("roomy")
    words = command(checkpoint, *FEW)
    assert roomy.run(words) == [0]
    sizes = [path.stat().st_size for path in roomy.folder.glob("outputs/*/weights.safetensors")]
    assert full.run(words, FILE_BYTES=str(min(sizes) - 1000)) == [1]
    assert "weights.safetensors: cannot be written" in full.said
    assert "Traceback" not in full.said
    assert not metrics(full.folder)
    check_whole(full.folder / "outputs")
    assert full.run([*words, "retry=failed"]) == [0]
    assert metrics(full.folder) == metrics(roomy.folder)


@pytest.mark.parametrize("cache", ["full", "read-only"])
def test_a_cache_that_cannot_be_written_changes_no_number(
    cache: str, checkpoint: Path, forks
) -> None:
    fine = forks("fine")
    words = command(checkpoint, *FEW, "save_weights=false")
    assert fine.run(words) == [0]
    if cache == "full":
        poor = forks("poor")
        assert poor.run(words, FILE_BYTES="30000") == [0]
    else:
        poor = forks("poor", QEXP_CACHE_DIR="/proc/qexp")  # not even root can write there
        assert poor.run(words) == [0]
    assert metrics(poor.folder) == metrics(fine.folder)
    assert poor.said.count("continuing without it") == 1
    for folder in (poor.folder, poor.folder.with_name("poor-cache")):
        check_whole(folder)


@pytest.mark.parametrize(
    ("launcher", "module"),
    [("cpu_pool", "joblib"), ("slurm_local", "submitit"), ("ray_local", "ray")],
)
def test_every_launcher_comes_to_the_same_numbers(
    launcher: str, module: str, checkpoint: Path, forks, tmp_path: Path
) -> None:
    plugin = f"hydra_plugins.hydra_{module}_launcher"
    if find_spec("hydra_plugins") is None or find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed (extra `launchers`)")
    serial = forks("serial")
    words = command(checkpoint, *FEW)
    assert serial.run(words) == [0]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    folder = tmp_path / launcher
    folder.mkdir()
    settings = {"QEXP_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path}
    settings["RAY_worker_niceness"] = "0"  # else a busy machine leaves its workers nothing
    done = subprocess.run(
        [sys.executable, "-m", "qexp", *words, f"hydra/launcher={launcher}"],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert metrics(folder) == metrics(serial.folder)
    assert "4 jobs: 4 ran, 0 answered from disk, 0 failed" in done.stderr
    assert [entry.status for entry in records(folder)] == ["done"] * 4


def test_a_search_goes_on_after_a_kill(checkpoint: Path, forks) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="extra `optuna`")
    killed = forks("killed")
    words = [word for word in command(checkpoint, "search=bits_and_ppl") if word != "-m"]
    words += ["hydra.sweeper.n_trials=6"]
    for folders in (1, 2):  # killed as a trial runs
        assert killed.run(words, kill=0.3, folders=folders) == [-9]
    assert killed.run(words) == [0]
    import optuna

    storage = f"sqlite:///{killed.folder}/outputs/.sweeps/search.db"
    [summary] = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 6
    assert {"FAIL"} <= set(states) <= {"COMPLETE", "FAIL", "RUNNING"}
    assert all(len(trial.values) == 2 for trial in study.trials if trial.values)
    assert killed.run(words) == [0]  # nothing is left to try
    assert len(optuna.load_study(study.study_name, storage).trials) == len(states)
    assert {entry.status for entry in records(killed.folder) if entry.folder} == {"done"}
    check_whole(killed.folder / "outputs")
