"""Import closure of modules, and the hash of its sources: which code a job depends on.

A job depends on the modules of its classes and on what these import, at any depth and also inside
functions. `__init__` files of packages only pass names on: a name that is imported from a package
leads to the module that defines it, and the other modules of the package do not count.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qexp.common.hashes import PACKAGE

# Presentation and bookkeeping: no number depends on these, nor are their imports followed.
# qexp.runs reads and writes the files of runs, qexp.common.errors words messages.
UNCOUNTED = (
    *("qexp.cli", "qexp.commands", "qexp.sweeps", "qexp.report", "qexp.runs"),
    *("qexp.common.errors", "qexp.common.progress", "qexp.common.modules"),
)
PIPELINE = "qexp.pipeline"  # what every run uses
UNWRITTEN = ("type_params", "type_comment", "kind", "ctx")  # absent in some versions of Python


@dataclass
class Sources:
    """The sources of a package by module name, in the state in which they were read."""

    texts: Mapping[str, str]
    packages: frozenset[str]  # modules that are an `__init__`
    _trees: dict[str, ast.Module] = field(default_factory=dict)
    _imports: dict[str, set[str]] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)

    def closure(self, names: Iterable[str]) -> set[str]:
        """The modules that some classes, functions or modules (dotted names) depend on."""
        found: set[str] = set()
        waiting = [self.module(name) for name in names]
        while waiting:
            name = waiting.pop()
            if name not in found and not _uncounted(name):
                found.add(name)
                waiting += self.imports(name)
        return found

    def digest(self, names: Iterable[str]) -> str:
        """Sixteen hex digits: the hash of the closure's sources, without comments, docstrings and
        layout. A class of another package counts with its own file alone."""
        lines = [f"{name} {self.hash(name)}\n" for name in sorted(self.closure(names))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    def module(self, name: str) -> str:
        """The module that defines a dotted name; the name itself where no module is known."""
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            if (module := ".".join(parts[:count])) in self.texts:
                return self._definer(module, parts[count]) if count < len(parts) else module
        return name

    def imports(self, module: str) -> set[str]:
        """The modules that a module imports, as far as the package has them."""
        if module not in self.texts:
            return set()  # of another package
        if module not in self._imports:
            found = {self.module(name) for _, name in self._bindings(module)}
            self._imports[module] = {name for name in found if name in self.texts}
        return self._imports[module]

    def hash(self, module: str) -> str:
        """The hash of one source; `missing` where there is none."""
        if module not in self._hashes:
            text = self.texts.get(module)
            tree = self._tree(module) if text is not None else _foreign(module)
            self._hashes[module] = (
                hashlib.sha256(normal(tree).encode()).hexdigest() if tree else "missing"
            )
        return self._hashes[module]

    def _definer(self, module: str, name: str) -> str:
        """The module from which a package passes a name on, else the module itself."""
        if module in self.packages:
            for bound, origin in self._bindings(module):
                if bound == name and origin != f"{module}.{name}":
                    return self.module(origin)
        return module

    def _bindings(self, module: str) -> Iterator[tuple[str, str]]:
        """The name that each import binds, and the dotted name that it stands for."""
        for node in ast.walk(self._tree(module)):
            if isinstance(node, ast.Import):
                yield from ((alias.asname or alias.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = module.split(".")[: None if module in self.packages else -1]
                start = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
                origin = ".".join(filter(None, [start, node.module]))
                for alias in node.names:
                    full = origin if alias.name == "*" else f"{origin}.{alias.name}"
                    yield alias.asname or alias.name, full

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self.texts[module])
        return self._trees[module]


@cache
def sources(folder: Path = PACKAGE) -> Sources:
    """The sources below a package's folder. Read once per process: a running sweep keeps the code
    that it imported, so an edit must not change its hash."""
    texts, packages = {}, set()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        texts[name] = path.read_text(encoding="utf-8")
        if parts[-1] == "__init__":
            packages.add(name)
    return Sources(texts, frozenset(packages))


def facts(names: Iterable[str]) -> dict[str, Any]:
    """Hash and number of the modules that some roots depend on, for the provenance."""
    return {
        "digest": sources().digest(names),
        "count": len(sources().closure(names)),
        "roots": list(names),
    }


def normal(node: Any) -> str:
    """A syntax tree as text, equal in all versions of Python, without docstrings and positions."""
    if isinstance(node, list):
        return f"[{','.join(map(normal, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list) and value and _is_docstring(node, value[0]):
            value = value[1:]
        if value not in (None, []) and name not in UNWRITTEN:
            fields.append(f"{name}={normal(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: ast.AST, first: ast.AST) -> bool:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return (
        isinstance(node, documented)
        and isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def _uncounted(name: str) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in UNCOUNTED)


def _foreign(name: str) -> ast.Module | None:
    """The source of the module of a class outside of the package."""
    parts = name.split(".")
    if parts[0] == PACKAGE.name:
        return None
    for count in range(len(parts), 0, -1):
        try:
            spec = find_spec(".".join(parts[:count]))
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return None
