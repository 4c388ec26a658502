"""The tests with the marker `gpu`, golden parities among them, on the accelerator."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from qexp.commands.bench.sizes import Sizes
from qexp.common.errors import UserError
from qexp.common.hashes import PACKAGE

LIMIT = 240  # seconds
COUNTS = ("tests", "failures", "errors", "skipped")


def suite(_: Sizes, device: str) -> dict[str, Any]:
    """The number of tests, of those that failed and of those that were left out, with the names of
    the former. Raises UserError where the checkout's tests are not there."""
    folder = PACKAGE.parent / "tests"
    marked = [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not marked:
        raise UserError(f"{folder}: has no tests; run from a checkout, or leave out the part tests")
    with TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        run = [sys.executable, "-m", "pytest", *words, *map(str, marked)]
        done = subprocess.run(
            run, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=LIMIT
        )
        if not report.is_file():
            raise RuntimeError(f"pytest: {(done.stdout + done.stderr).strip()[-500:]}")
        return counts(ElementTree.parse(report).getroot())


def counts(root: ElementTree.Element) -> dict[str, Any]:
    """The numbers of a report of pytest (JUnit XML)."""
    suites = list(root.iter("testsuite"))
    found: dict[str, Any] = {key: sum(int(each.get(key, 0)) for each in suites) for key in COUNTS}
    names = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if names:
        found["failed"] = ", ".join(names)
    return found
