"""Paths that leave the machine, and text that only looks like one."""

from pathlib import Path

import pytest

from qexp.runs.portable import portable


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QEXP_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/models/llama", "llama"),
        ("/home/alice smith/models/small llama", "small llama"),
        ("~/models/llama", "llama"),
        ("~alice/llama", "llama"),
        ("model.path=/home/alice/llama", "model.path=llama"),
        ("model.path='/home/alice smith/llama'", "model.path='llama'"),
        ("paths=[/home/alice/a,/home/alice/b]", "paths=[a,b]"),
        ("read /home/alice/a.txt: no file", "read a.txt: no file"),
        ("file:///home/alice/a.txt", "file://a.txt"),
        ("DATA/wikitext2/test.txt", "wikitext2/test.txt"),
        ("data.path=DATA/wikitext2/test.txt", "data.path=wikitext2/test.txt"),
    ],
)
def test_a_path_of_this_machine_is_a_name(text, shown, data) -> None:
    assert portable(text.replace("DATA", str(data))) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("wikitext2/test.txt", "held_out/ppl", "https://a.org/b/c", "</s>", "and/or", "a / b"),
        *("${data.folder}/x", "../outputs/1a2b3c4d", "{{text}}/{{answer}}", "1/2", ""),
    ],
)
def test_what_is_no_such_path_stays(text) -> None:
    assert portable(text) == text


def test_keys_and_lists_of_a_tree_too(data) -> None:
    tree = {"/home/alice/a": ["/home/alice/b", 1, None, True], "c": {"d": f"{data}/e/f"}}
    assert portable(tree) == {"a": ["b", 1, None, True], "c": {"d": "e/f"}}
