"""Cache entries: listing, and pruning that spares entries in use."""

import os
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open

from qexp import cli
from qexp.commands import cache
from qexp.common import cache_entries
from qexp.common.cache import Cache
from qexp.common.errors import UserError


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens of 1 h, Hessians of 3 and 2 h, a fetched model and a converted one of 9 h ago."""
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path))
    for kind, key, hours in (("tokens", 0, 1.01), ("hessians", 1, 3), ("hessians", 2, 2)):
        Cache().put(kind, {"key": key}, {"x": torch.zeros(1000)})
        [path] = [p for p in (tmp_path / kind).iterdir() if time.time() - p.stat().st_mtime < 600]
        age(path, hours)
    for name in ("models/ab/file", "converted/cd/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"1234")
        age(tmp_path / name, 9)
        age((tmp_path / name).parent, 9)
    return tmp_path


def age(path: Path, hours: float) -> None:
    os.utime(path, (time.time() - hours * 3600,) * 2)


def kinds(folder: Path) -> list[str]:
    return sorted(entry.kind for entry in cache_entries.stored(folder))


def test_the_command_shows_every_kind(filled: Path, capsys: pytest.CaptureFixture) -> None:
    cache.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["converted", "1"],
        ["hessians", "2"],
        ["models", "1"],
        ["tokens", "1"],
    ]
    assert lines[2].split()[2:] == ["8.2", "KB", "2", "h", "to", "3", "h"]
    assert lines[-1].startswith("cache: 5 entries") and str(filled) in lines[-1]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], ["models"]),
        (["--older", "150m"], ["hessians", "models", "tokens"]),
        (["--kind", "hessians"], ["converted", "models", "tokens"]),
        (["--kind", "models"], ["converted", "hessians", "hessians", "tokens"]),
        (["--size", "8.5K"], ["hessians", "models", "tokens"]),
    ],
)
def test_what_is_named_goes_the_longest_idle_first(options, left, filled: Path) -> None:
    cache.main(["--prune", *options])
    assert kinds(filled) == left
    assert not [path for path in filled.rglob("*.lock") if path.with_suffix("").exists()]


def test_use_makes_an_entry_young(filled: Path) -> None:
    assert Cache().find("hessians", {"key": 1}) is not None
    cache_entries.prune(filled, older=600.0)
    assert Cache().find("hessians", {"key": 1}) is not None
    assert Cache().find("hessians", {"key": 2}) is None


def test_an_entry_that_is_being_made_stays_and_an_open_one_is_readable(filled: Path) -> None:
    made, opened = sorted((filled / "hessians").glob("*.safetensors"))
    with FileLock(made.with_suffix(".lock")), safe_open(opened, "pt") as file:
        cache_entries.prune(filled)
        assert made.exists() and not opened.exists()
        assert file.get_tensor("x").shape == (1000,)


@pytest.mark.parametrize("wrong", [["--older", "7w"], ["--size", "many"]])
def test_a_wrong_number_is_refused(wrong, filled: Path) -> None:
    with pytest.raises(UserError, match=f"{wrong[0]} {wrong[1]}"):
        cache.main(["--prune", *wrong])
    assert len(kinds(filled)) == 5


def test_the_command_line_reaches_it(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["qexp", "cache", "--prune", "--older", "7w"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "--older 7w: give a number with a unit" in capsys.readouterr().err
