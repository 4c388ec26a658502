"""The code that a job depends on, and what does not belong to it."""

import ast

import pytest

from qexp.common.hashes import PACKAGE
from qexp.common.modules import UNCOUNTED, Sources, normal, sources

GPTQ = ("qexp.pipeline", "qexp.methods.blockwise.Blockwise", "qexp.solvers.gptq.GPTQ")
GPTQ = (*GPTQ, "qexp.hessian.Layerwise", "qexp.grid.IntGrid")


def digest(module: str, text: str) -> str:
    """The digest of a GPTQ job after an edit of one module."""
    base = sources()
    base.digest(GPTQ)  # fills what the edited sources share
    kept = [
        {name: value for name, value in each.items() if name != module}
        for each in (base._trees, base._imports, base._hashes)
    ]
    return Sources({**base.texts, module: text}, base.packages, *kept).digest(GPTQ)


@pytest.mark.parametrize(
    "module",
    [
        "qexp.solvers.gptq",
        "qexp.solvers.sweep",  # imported by the solver
        "qexp.grid.ranges",  # imported by the pipeline
        "qexp.hessian.layerwise",  # passed on by the package
        "qexp.pipeline",
    ],
)
def test_a_change_of_what_it_uses_counts(module) -> None:
    assert digest(module, f"{sources().texts[module]}\nADDED = 1\n") != sources().digest(GPTQ)


@pytest.mark.parametrize(
    "module",
    [
        *("qexp.report.tables", "qexp.report.loggers", "qexp.commands.report", "qexp.sweeps.job"),
        *("qexp.runs.record", "qexp.cli", "qexp.common.progress", "qexp.solvers"),
        *("qexp.solvers.billm", "qexp.solvers.spqr", "qexp.transforms.rotate"),
        *("qexp.methods.finetune", "qexp.eval.perplexity"),
    ],
)
def test_a_change_elsewhere_does_not(module) -> None:
    assert digest(module, f"{sources().texts[module]}\nADDED = 1\n") == sources().digest(GPTQ)


def test_comments_docstrings_and_layout_do_not_count() -> None:
    tree = ast.parse(sources().texts["qexp.solvers.gptq"])
    tree.body[0] = ast.Expr(ast.Constant("Another docstring."))
    other = f"# note\n{ast.unparse(tree)}"
    assert digest("qexp.solvers.gptq", other) == sources().digest(GPTQ)


def test_names_lead_through_packages_to_their_modules() -> None:
    found = sources()
    assert found.module("qexp.solvers.GPTQ") == "qexp.solvers.gptq"
    assert found.module("qexp.solvers.gptq.GPTQ") == "qexp.solvers.gptq"
    assert found.module("qexp.pipeline") == "qexp.pipeline"
    closure = found.closure(GPTQ)
    assert {"qexp.solvers.sweep", "qexp.walk.blocks", "qexp.grid.ranges"} <= closure
    assert not {"qexp.solvers.billm", "qexp.solvers", "qexp.transforms.rotate"} & closure
    assert not [name for name in closure if name.startswith(UNCOUNTED)]


def test_every_way_to_import_is_followed() -> None:
    texts = {
        "p": "",
        "p.a": "import p.b\nfrom p import c\nfrom .d import f\ndef g():\n    from p.e import h",
        "p.k": "from p.pack import Name, own\nimport other",
        "p.pack": "from p.pack.one import Name as Name\nown = 1",
        "p.pack.one": "from p.b import *\nclass Name: ...",
        "p.pack.two": "",
        **dict.fromkeys(("p.b", "p.c", "p.d", "p.e"), "x = 1"),
    }
    found = Sources(texts, frozenset({"p", "p.pack"}))
    assert found.closure(["p.a.g"]) == {"p.a", "p.b", "p.c", "p.d", "p.e"}
    assert found.closure(["p.pack.Name"]) == {"p.pack.one", "p.b"}
    assert found.closure(["p.k"]) == {"p.k", "p.pack", "p.pack.one", "p.b"}


def test_packages_only_pass_names_on() -> None:
    """Else what an `__init__` does would count for no job."""
    for path in PACKAGE.rglob("__init__.py"):
        if ".".join(path.relative_to(PACKAGE.parent).parts).startswith(UNCOUNTED):
            continue
        if path.parent == PACKAGE:  # the Python interface, which no job uses
            continue
        body = ast.parse(path.read_text()).body[1:]
        kinds = {type(node) for node in body if not ast.unparse(node).startswith("__version__")}
        assert kinds <= {ast.ImportFrom, ast.Import}, path


def test_a_class_of_another_package_counts_with_its_file(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "mine_for_test.py"
    path.write_text("class Solver: ...")
    digests = []
    for text in ("class Solver: ...", "class Solver:\n    x = 1"):
        path.write_text(text)
        digests.append(
            Sources(sources().texts, sources().packages).digest(["mine_for_test.Solver"])
        )
    assert digests[0] != digests[1]
    assert sources().digest(["qexp.gone.Class"]) != sources().digest([])


def test_a_tree_is_text_without_positions() -> None:
    one = ast.parse('def f(a):\n    """Doc."""\n    return f"{a!r:>3}" + "x"  # why')
    two = ast.parse("def f(a): return (f'{a!r:>3}' + 'x')")
    assert normal(one) == normal(two)
    assert normal(one) != normal(ast.parse("def f(a): return f'{a!r:>4}' + 'x'"))
