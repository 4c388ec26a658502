"""The cache: what is in it is right, and a cache that cannot work never stops a run."""

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qexp.common import collectives, ranks
from qexp.common.cache import Cache
from qexp.common.errors import UserError

KEY = {"model": "a", "seed": 0}


def entry(folder: Path) -> Path:
    [path] = folder.glob("**/*.safetensors")
    return path


def get(folder: Path, calls: list[int], key: dict = KEY) -> torch.Tensor:
    def build() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.arange(6.0).view(2, 3).T, "empty": torch.zeros(0, 4)}

    tensors = Cache(folder).get("kind", key, build)
    assert tensors["empty"].shape == (0, 4)
    return tensors["x"]


def test_built_once_and_equal(tmp_path: Path) -> None:
    calls: list[int] = []
    first, second = get(tmp_path, calls), get(tmp_path, calls)
    assert len(calls) == 1
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_one_process_of_several_may_want_an_entry(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(collectives, "from_first", lambda make: pytest.fail("it waits"))
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    calls: list[int] = []

    def build() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.ones(2)}

    for _ in range(2):
        assert bool(Cache(tmp_path, together=False).get("kind", KEY, build)["x"].all())
    assert len(calls) == 1


def test_every_part_of_the_key_counts(tmp_path: Path) -> None:
    """OmniQuant's cache forgot seed and length; a sweep over seeds then reads one run's data."""
    calls: list[int] = []
    for key in (KEY, {**KEY, "seed": 1}, {**KEY, "length": 512}, {"model": "a"}):
        get(tmp_path, calls, key)
    assert len(calls) == 4


def test_the_code_of_the_stage_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    get(tmp_path, calls)
    monkeypatch.setattr("qexp.common.cache._source", lambda build: "changed code")
    get(tmp_path, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "empty", "other key"])
def test_damage_is_found_and_repaired(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    expected = get(tmp_path, calls)
    path = entry(tmp_path)
    content = path.read_bytes()
    if damage == "other key":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {**file.metadata(), "key": "{}"}
        save_file(tensors, path, metadata)
    else:
        damaged = {
            "cut": content[:-4],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "garbage": b"not a safetensors file at all",
            "empty": b"",
        }
        path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(get(tmp_path, calls), expected)
    assert "rebuilding" in caplog.text
    assert len(calls) == 2
    get(tmp_path, calls)
    assert len(calls) == 2


def test_a_folder_that_cannot_be_made_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")  # permissions would not stop root; a file in the way does
    calls: list[int] = []
    with caplog.at_level(logging.WARNING):
        get(tmp_path / "file", calls)
        get(tmp_path / "file", calls)
    assert len(calls) == 2
    assert caplog.text.count("continuing without it") == 1


def test_a_full_disk_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qexp.common.cache.save_file", full)
    with caplog.at_level(logging.WARNING):
        get(tmp_path, [])
        get(tmp_path, [])
    assert caplog.text.count("No space left on device") == 1
    assert not list(tmp_path.glob("**/*.safetensors"))
    assert not list(tmp_path.glob("**/*.tmp*"))


def test_errors_of_the_stage_go_through_and_leave_nothing(tmp_path: Path) -> None:
    def build() -> dict[str, torch.Tensor]:
        raise UserError("no text")

    with pytest.raises(UserError, match="no text"):
        Cache(tmp_path).get("kind", KEY, build)
    assert not list(tmp_path.glob("**/*.safetensors"))
    get(tmp_path, [])


def _process(folder: Path, started: "multiprocessing.Barrier") -> None:
    def build() -> dict[str, torch.Tensor]:
        with open(folder / "calls", "a") as file:
            file.write("x")
        return {"x": torch.ones(1000)}

    started.wait()
    assert Cache(folder).get("kind", KEY, build)["x"].sum() == 1000


def test_processes_that_want_the_same_entry_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    started = context.Barrier(2)
    processes = [context.Process(target=_process, args=(tmp_path, started)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_the_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QEXP_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "qexp"
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "own"))
    assert Cache().folder == tmp_path / "own"
