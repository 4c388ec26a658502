"""The layout of the code: sizes, docstrings, places of tests, cost of an import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qexp

PACKAGE = Path(qexp.__file__).parent
TESTS = Path(__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = {path.parent.relative_to(PACKAGE).as_posix() for path in SOURCES}
QUESTIONS = ("What ", "How ", "Which ", "Where ", "Why ")


def test_the_root_stays_small() -> None:
    entries = {path.relative_to(PACKAGE).parts[0] for path in SOURCES}
    assert len(entries) <= 27, f"give {sorted(entries)} fewer entries"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_is_one_idea(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "a module says what it is in one line"
    assert not docstring.startswith(QUESTIONS), "a noun phrase names a module, not a question"


def test_tests_are_where_their_modules_are() -> None:
    """A folder of tests has the name of a package; at the top are tests of modules at the root,
    and of the project as a whole."""
    roots = {"devices", "layout", "packaging", "public_names", "simulated_device", "site"}
    for path in sorted(TESTS.rglob("test_*.py")):
        folder = path.parent.relative_to(TESTS).as_posix()
        if folder == ".":
            name = path.stem.removeprefix("test_")
            assert name in roots or (PACKAGE / f"{name}.py").is_file(), path.name
        else:
            assert folder in PACKAGES, path


def test_the_command_imports_nothing_heavy() -> None:
    program = "import sys, qexp.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
