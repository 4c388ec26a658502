"""A file of one's own as a corpus: where it is cut in two, and what cannot serve."""

import gzip
import json
from pathlib import Path

import pytest

from qexp.common.errors import UserError
from qexp.data.local import Local


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_a_local_file_of_records_is_cut_at_a_record(suffix: str, tmp_path: Path) -> None:
    records = [{"body": f"text {i}", "n": i} for i in range(10)]
    path = tmp_path / f"mine{suffix}"
    lines = "\n".join(map(json.dumps, records))
    if suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if ".gz" in suffix else lines.encode())
    corpus = Local(str(path), "body", 0.3)
    assert corpus.documents("train") == ["text 0", "text 1", "text 2"]
    assert corpus.text("test") == "\n\n".join(f"text {i}" for i in range(3, 10))
    with pytest.raises(UserError, match=r"data\.field.*'text'.*body"):
        Local(str(path)).documents("train")


def test_a_local_text_is_cut_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    text = "".join(f"line {i} of this text\n" for i in range(101))
    path.write_text(text)
    corpus = Local(str(path))
    train, test = corpus.text("train"), corpus.text("test")
    assert train + test == text and train.endswith("\n")
    assert abs(len(train) - len(test)) < 50


def test_a_text_of_one_line_is_cut_between_words(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("some words " * 50)
    corpus = Local(name="local", path=str(path))
    first, second = corpus.text("train"), corpus.text("test")
    assert first + second == path.read_text()
    assert first.endswith(" ") and 200 < len(first) < 350


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a file"),
        (b"\n\n", "too little text"),
        (b"\xff\xfe\xfa", "UTF-8"),
        (b"", "too little text"),
    ],
)
def test_a_local_text_that_cannot_serve(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        Local(str(path)).text("train")


def test_broken_records_name_the_file(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b"{"), ("b.parquet", b"no"), ("c.json.gz", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            Local(str(tmp_path / name)).documents("train")
