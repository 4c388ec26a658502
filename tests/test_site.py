"""The documentation: its commands and programs run, its messages are those of the code."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import pytest

import qexp
from qexp import api, arch, cli
from qexp.common.modules import sources
from qexp.config import options
from qexp.report import reference
from qexp.sweeps import in_process

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
RUN = [  # pages whose commands and programs run in an empty folder, in order
    *("start/quickstart", "start/first_comparison"),
    *("guides/own_data", "guides/own_model", "guides/sweeps"),
    *("extend/method", "extend/family", "extend/metric"),
]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which modules are found, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("QEXP_SWEEP", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(arch, "ARCHS", dict(arch.ARCHS))
    matplotlib.use("Agg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_page_does_what_it_says(name: str, inside: Path) -> None:
    space: dict = {}
    for language, title, text in FENCE.findall((DOCS / f"{name}.md").read_text("utf-8")):
        if title.startswith("entry of ARCHS"):
            arch.ARCHS.update(eval(f"{{{text}}}", vars(arch)))
        elif title:
            (inside / title).parent.mkdir(parents=True, exist_ok=True)
            (inside / title).write_text(text)
        elif language == "python":
            exec(text, space)
        elif language == "console":
            for line in text.splitlines():
                assert line.startswith("$ "), line
                assert command(line[2:]) == 0, line


def command(line: str) -> int:
    words = shlex.split(line.removeprefix("$ "))
    words = words[2:] if words[:2] == ["python", "-m"] else words
    assert words[0] == "qexp"
    if words[1] in cli.COMMANDS:
        return cli.command(words[1], words[2:])
    return in_process.command([*words[1:], "progress=false", "threads=1"])


@pytest.mark.slow
def test_the_notebook_runs(inside: Path, capsys) -> None:
    space: dict = {}
    for cell in json.loads((DOCS / "notebooks/compare.ipynb").read_text("utf-8"))["cells"]:
        assert not cell.get("outputs"), "it is committed without outputs"
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            if isinstance(tree.body[-1], ast.Expr):  # a notebook shows the last expression
                tree.body[-1] = ast.parse(f"print({ast.unparse(tree.body[-1])})").body[0]
            exec(compile(tree, "compare.ipynb", "exec"), space)
    said = capsys.readouterr().out
    assert "weight.bits" in said and "error_before" in said and "The documentation of" in said


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    known = {
        node.value
        for text in sources().texts.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    known |= {"No space left on device"}  # the system's
    page = (DOCS / "start/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(messages) >= 20
    for message in messages:
        for part in re.split(r"…|; ", message):
            words = part.strip(" ':;?.()")
            assert any(words in each for each in known), (message, words)


def test_the_reference_has_every_option_with_its_paper() -> None:
    pages = reference.pages()
    for group, found in options.groups().items():
        text = pages[f"reference/{group.partition('/')[0]}.md"]
        for option in found:
            assert f"{{#{group.replace('/', '-')}-{option.name}}}" in text
            assert all(f"arxiv.org/abs/{paper}" in text for paper in option.papers)
    assert "damp: 0.01 # share of the mean diagonal" in pages["reference/method.md"]
    assert "Class `qexp.solvers.gptq.GPTQ`. " in pages["reference/method.md"]
    assert all(name in pages["reference/index.md"] for name in ("`method/hessian`", "seed: 0"))


def test_the_interface_is_described() -> None:
    page = reference.interface()
    for name in ("run", "sweep", "load", "runs"):
        assert f"## `qexp.{name}`" in page and getattr(api, name).__doc__
    assert "- `UserError`: A wrong key, choice or value" in page
    assert "| `metrics`: `dict[str, float]` |" in page and "| `layers` | The rows of" in page


def test_every_page_has_its_place_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    made = {*reference.pages(), "changelog.md", "contributing.md", "notebooks/compare.md"}
    assert listed == there | made


def test_versions_agree() -> None:
    assert f"version: {qexp.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## {qexp.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_image_installs_the_package_as_it_is() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / word).exists() for word in line.split()[1:-1]), line
    assert sys.version_info >= (3, 11) and "FROM python:3.11-slim" in lines
