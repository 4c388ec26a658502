"""Several processes that train one run: who is who, how they begin, and what comes of it."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf

from qexp.common import launch, ranks
from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.sweeps.callbacks import Ledger

SMALL = ["model=tiny_llama", "data=synthetic", "calibration.sequences=8", "calibration.length=32"]
SMALL += ["eval.held_out.length=32", "eval.held_out.limit=4", "progress=false", "logger=none"]
SMALL += ["method=lsq", "threads=1"]
RATE = "method.optimizer.weights=5e-4"
STEPS = ["trainer.steps=4", "trainer.sequences=2", "trainer.every=2"]


def as_one_of(patch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    for name, value in {"LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
        patch.setenv(name, str(value))


def test_alone_this_process_is_the_first(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # some cluster's own, of jobs that do not train together
    assert (ranks.rank(), ranks.world(), ranks.nodes()) == (0, 1, 1)
    monkeypatch.delenv("RANK")
    as_one_of(monkeypatch, 1)
    assert (ranks.rank(), ranks.local_rank(), ranks.world()) == (1, 1, 2)
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))  # as torchrun says it on the second of two machines
    assert (ranks.rank(), ranks.local_rank(), ranks.nodes()) == (5, 1, 2)


def as_a_task(patch: pytest.MonkeyPatch, **others: str) -> None:
    """As `srun` says it on the second of two machines with two tasks each."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        patch.setenv(name, "removed")  # so that it is restored afterwards
        patch.delenv(name)
    for name in ("LOCAL_WORLD_SIZE", "NODE_RANK"):
        patch.setenv(name, "removed")
        patch.delenv(name)
    slurm = {"NTASKS": "4", "NNODES": "2", "PROCID": "3", "LOCALID": "1", "NODEID": "1"}
    slurm |= {"NTASKS_PER_NODE": "2", "NODELIST": "node[07-08]", "JOB_ID": "123456"}
    for name, value in (slurm | others).items():
        patch.setenv(f"SLURM_{name}", value)


@pytest.mark.filterwarnings("ignore:The `srun` command")
def test_the_tasks_of_slurm_are_the_processes_of_one_run(monkeypatch):
    as_a_task(monkeypatch)
    launch.adopt_slurm(1, "auto")  # each task is a run of its own
    assert ranks.world() == 1
    launch.adopt_slurm(2, "ddp")
    assert (ranks.rank(), ranks.local_rank(), ranks.world(), ranks.nodes()) == (3, 1, 4, 2)
    environment = launch.cluster()
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.node_rank()) == ("node07", 1)
    assert environment.main_port == 15000 + 3456


def test_another_number_of_tasks_is_refused(monkeypatch):
    as_a_task(monkeypatch)
    said = r"^trainer\.devices=4: srun started 4 tasks on 2 machine.*trainer\.devices=2"
    with pytest.raises(UserError, match=said):
        launch.adopt_slurm(4, "auto")


def test_another_count_than_was_started_is_refused(monkeypatch):
    as_one_of(monkeypatch, 0, 4)
    said = r"^trainer\.devices=2: 4 processes were started on 1 machine.*trainer\.devices=4"
    with pytest.raises(UserError, match=said), launch.processes(None, 2):
        pass


def test_only_the_command_starts_others(tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(UserError, match="torchrun"), launch.processes(folder, 2):
            pass


def test_a_process_that_ends_too_early_ends_the_run(tmp_path, monkeypatch):
    """Instead of a wait in torch for half an hour; and the environment is as it was."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / launch.CONFIG).touch()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    before, threads = dict(os.environ), torch.get_num_threads()
    said = r"^trainer\.devices=3: process 2 ended before the run began"
    with pytest.raises(UserError, match=said), launch.processes(tmp_path, 3):
        pass
    assert dict(os.environ) == before and torch.get_num_threads() == threads


def test_a_process_that_dies_in_training_is_said_to_have_done_so(tmp_path, monkeypatch):
    """Instead of torch's words for a peer that does not answer."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / launch.CONFIG).touch()
    other = tmp_path / "other"
    other.write_text(
        f"#!/bin/bash\nprintf ! >&${launch.CALL}; read -n 1 <&${launch.CALL}; exit 7\n"
    )
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(other))
    said = r"^trainer\.devices=2: 1 of the other processes ended .*exit code 7"
    with pytest.raises(UserError, match=said), launch.processes(tmp_path, 2):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(KeyError, match="its own"), launch.processes(tmp_path, 2):
        raise KeyError("its own")  # of which the other may die as well


def test_a_process_alone_is_placed_and_leaves_no_trace(tmp_path):
    before = dict(os.environ)
    with launch.processes(None, 1):
        assert os.environ["WORLD_SIZE"] == "1"
        assert ranks.rank() == 0
    assert dict(os.environ) == before


def test_a_process_called_by_nobody_is_done(monkeypatch):
    """The one that started it is gone."""
    own, theirs = socket.socketpair()
    as_one_of(monkeypatch, 1)
    monkeypatch.setenv(launch.CALL, str(theirs.detach()))
    own.close()
    with pytest.raises(ranks.Done), launch.processes(None, 2):
        pass


def test_others_do_not_wait_for_what_the_first_is_making(tmp_path, monkeypatch):
    """It may be training, for which it waits for them."""
    cache, key = Cache(tmp_path), {"of": "it"}
    path, _ = cache._place("kind", {**key, "code": "any"})
    as_one_of(monkeypatch, 1)
    monkeypatch.setattr("qexp.common.cache._source", lambda module: "any")
    path.parent.mkdir()
    with FileLock(path.with_suffix(".lock")):
        made = cache.get("kind", key, lambda: {"x": torch.ones(2)})
    assert torch.equal(made["x"], torch.ones(2)) and not path.exists()


def qexp(
    folder: Path, *words: str, before: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    place = {"QEXP_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, *before, "-m", "qexp", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **place},
        stderr=subprocess.PIPE,
        text=True,
    )


def result(folder: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Of the only run in a folder: its metrics and its training log."""
    [run] = (path.parent for path in folder.glob("outputs/*/metrics.json"))
    assert not list(run.glob("training-*/"))
    with (run / "training.csv").open(newline="") as file:
        lines = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    return json.loads((run / "metrics.json").read_text()), lines


@pytest.mark.slow
def test_the_command_trains_with_two_processes_as_with_one(tmp_path):
    """Started by the run, with whole models and in shards, and by torchrun. Each process has half
    of every step's batches."""
    commands = {
        "one": ["trainer.accumulate=2"],
        "ddp": ["trainer=ddp"],
        "fsdp": ["trainer=fsdp"],
        "torchrun": ["trainer=ddp"],
    }
    for name, words in commands.items():
        order = [*SMALL, RATE, *words, *STEPS]
        folder = tmp_path / name
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = qexp(folder, *order, before=torchrun if name == "torchrun" else ())
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    metrics, lines = result(tmp_path / "one")
    for name in ("ddp", "fsdp", "torchrun"):
        others, other_lines = result(tmp_path / name)
        assert others == pytest.approx(metrics, rel=1e-3)
        for one, two in zip(lines, other_lines, strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_a_sweep_is_not_for_torchrun(monkeypatch):
    """The second job would meet the addresses of the first one's processes."""
    as_one_of(monkeypatch, 0)
    with pytest.raises(SystemExit, match=r"^torchrun: its processes are for one run"):
        Ledger().on_multirun_start(OmegaConf.create({}))


@pytest.mark.slow
def test_a_loss_that_does_not_reach_the_head_trains_on_several_devices(tmp_path):
    process = qexp(tmp_path, *SMALL, RATE, *STEPS, "method/loss=hidden_l2", "trainer=ddp")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said


@pytest.mark.slow
def test_a_fault_of_the_second_process_is_seen_by_who_started_it(tmp_path):
    """`torchrun` ends all when one ends with a code that is not 0; the first writes the reason."""
    words = [*SMALL, *STEPS, "trainer=ddp", "method.optimizer.weights=-1"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    process = qexp(tmp_path, *words, **place, RANK="1", LOCAL_RANK="1")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "process 2: method.optimizer.weights=-1: give" in said
    assert not list(tmp_path.glob("outputs/*/failure.json"))


@pytest.mark.slow
def test_what_all_processes_meet_is_said_once(tmp_path):
    rates = ["method.optimizer.weights=1e30", "method.optimizer.warmup=0.0"]
    process = qexp(tmp_path, *SMALL, *STEPS, *rates, "method.optimizer.clip=null", "trainer=ddp")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert said.count("finite") == 1 and "failed: training: step" in said
