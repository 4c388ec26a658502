"""The share of a machine that each of several parallel jobs uses."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import ROOT
from helpers.simulated_device import write_entry_point
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.common.files import locked
from qexp.config import location
from qexp.sweeps import gpu_pool


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"n_jobs": 2}, 4),
        ({"n_jobs": 3}, 2),
        ({"n_jobs": 16}, 1),
        ({"n_jobs": -1}, 1),
        ({"cpus_per_task": 6}, 6),
        ({"cpus_per_task": None}, None),
        ({"ray": {"remote": {"num_cpus": 3}}}, 3),
        ({}, None),
    ],
)
def test_threads_are_divided(launcher, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert gpu_pool.threads(OmegaConf.create(launcher)) == expected


def test_visible_gpus_are_shared_and_none_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_pool.VISIBLE, "4,GPU-12ab")
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        choice = ["hydra/launcher=gpu_pool", "hydra.callbacks.gpu_pool.per_gpu=3"]
        cfg = compose("config", choice, return_hydra_config=True)
    assert cfg.hydra.launcher.n_jobs == 6
    monkeypatch.setenv(gpu_pool.VISIBLE, "")
    with pytest.raises(UserError, match="no GPU"):
        gpu_pool.gpu_slots(1)


def _worker(folder: Path, seen: "multiprocessing.Queue", leave: "multiprocessing.Event") -> None:
    gpu_pool.tempfile.tempdir = str(folder)
    pool = gpu_pool.GpuPool(per_gpu=2)
    pool.on_job_start(OmegaConf.create({}))
    pool.on_job_start(OmegaConf.create({}))  # its second job: the same GPU
    seen.put(os.environ[gpu_pool.VISIBLE])
    leave.wait(60)


@pytest.mark.slow
def test_each_process_has_a_gpu_and_leaves_it_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpu_pool.VISIBLE, "0,1")
    context = multiprocessing.get_context("spawn")
    seen, leave = context.Queue(), [context.Event() for _ in range(4)]  # one is killed as it waits
    workers = [context.Process(target=_worker, args=(tmp_path, seen, each)) for each in leave]
    for worker in workers:
        worker.start()
    assert sorted(seen.get(timeout=120) for _ in workers) == ["0", "0", "1", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_pool.time, "sleep", lambda _: pytest.fail("would wait"))
        patch.setattr(gpu_pool.tempfile, "tempdir", str(tmp_path))
        with pytest.raises(pytest.fail.Exception):
            gpu_pool.free_gpu(["0", "1"], 2)
        workers[0].kill()
        workers[0].join(60)
        assert gpu_pool.free_gpu(["0", "1"], 2) in ("0", "1")
    for worker, each in zip(workers[1:], leave[1:], strict=True):
        each.set()
        worker.join(60)
        assert worker.exitcode == 0


@pytest.mark.slow
def test_a_job_runs_on_the_gpu_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a simulated device: the first is taken, so it is the second, which is its only one."""
    write_entry_point(tmp_path)
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT / "tests", ROOT))),
        "QEXP_CACHE_DIR": str(tmp_path / "cache"),
        "SIMULATED_LOG": str(tmp_path / "log"),
        "TMPDIR": str(tmp_path),  # of the slots
        gpu_pool.VISIBLE: "0,1",
    }
    monkeypatch.setattr(gpu_pool.tempfile, "tempdir", str(tmp_path))
    words = ["model=tiny_llama", "data=synthetic", "method=rtn", "weight.group_size=32"]
    words += ["eval.held_out.length=32", "eval.held_out.limit=2", "progress=false"]
    words += ["+hydra.callbacks.pool._target_=qexp.sweeps.gpu_pool.GpuPool"]
    with locked(Path(tmp_path) / f"qexp-gpus-{os.getuid()}" / "0.0", wait=False) as taken:
        assert taken
        subprocess.run(
            [sys.executable, "-m", "qexp", *words],
            env={**os.environ, **environment},
            cwd=tmp_path,
            check=True,
        )
    [provenance] = tmp_path.glob("outputs/*/provenance.json")
    assert json.loads(provenance.read_text())["device"] in ("sim", "sim:0")
    [seen] = (tmp_path / "log").read_text().splitlines()
    assert seen.split()[1:] == ["1"]
