"""Files are whole or absent."""

import errno
import os
import subprocess
import sys

import pytest

from qexp.common.errors import UserError
from qexp.common.files import atomic, locked


def test_a_file_appears_with_its_content_and_the_usual_mode(tmp_path) -> None:
    path = tmp_path / "new" / "file.json"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("content")
        assert not path.exists()
    assert path.read_text() == "content"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, error) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_full_disk_is_a_sentence_with_the_file(tmp_path, monkeypatch, call) -> None:
    path = tmp_path / "file.json"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call != "write":
        monkeypatch.setattr(os, call, full)
    said = r"file\.json: cannot be written \(No space left"
    with pytest.raises(UserError, match=said), atomic(path) as temporary:
        temporary.write_text("content")
        if call == "write":
            full()
    assert not list(tmp_path.iterdir())


def test_a_saver_that_keeps_only_the_words_is_understood(tmp_path) -> None:
    with pytest.raises(UserError, match="weights"), atomic(tmp_path / "weights"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_an_error_about_another_file_keeps_its_name(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic(tmp_path / "file"):
        (tmp_path / "absent").read_text()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), atomic(tmp_path / "file" / "below"):
        pass


@pytest.mark.parametrize("name", ["metrics.json", ".hydra/config.yaml"])
def test_a_lock_removes_what_a_killed_process_left(tmp_path, name) -> None:
    path = tmp_path / name
    program = "import os, sys; from pathlib import Path; from qexp.common.files import atomic\n"
    program += "with atomic(Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    [leftover] = path.parent.iterdir()
    kept = path.parent / "kept.json"
    kept.touch()
    with locked(tmp_path) as mine:
        assert mine
        assert not leftover.exists() and kept.exists()
