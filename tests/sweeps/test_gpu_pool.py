"""The share of a machine that each of several parallel jobs uses."""

import multiprocessing
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp.common.errors import UserError
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
