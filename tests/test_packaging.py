"""The wheel: its content is that of the checkout."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import qexp
from qexp.config import location
from qexp.report import html

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_configurations_are_found_in_a_checkout_and_inside_a_package(tmp_path, monkeypatch) -> None:
    assert location.conf() == ROOT / "conf"
    shutil.copytree(ROOT / "qexp", tmp_path / "qexp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "qexp" / "conf")
    program = (
        "import qexp.cli; from qexp.config.location import conf; print(conf()); qexp.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--cfg", "job", "method=rtn"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.splitlines()[0] == str(tmp_path / "qexp" / "conf")
    assert "RTN" in done.stdout


def test_the_wheel_takes_the_configurations_along() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["qexp"], "force-include": {"conf": "qexp/conf"}}
    assert PROJECT["project"]["scripts"] == {"qexp": "qexp.cli:main"}
    assert PROJECT["project"]["version"] == qexp.__version__


def test_the_wheel_has_the_parts_of_the_report_page() -> None:
    builder = WheelBuilder(str(ROOT))
    with builder.config.set_build_data({"artifacts": [], "force_include": {}}):
        held = {file.distribution_path for file in builder.recurse_included_files()}
    for name in ("page.css", *html.SCRIPTS):
        assert f"qexp/report/page/{name}" in held
        assert len((html.PAGE / name).read_text(encoding="utf-8").splitlines()) <= 250


def test_every_dependency_has_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert exact["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"].values()
    for wanted in [
        *PROJECT["project"]["dependencies"],
        *(each for many in extras for each in many),
    ]:
        name = re.split(r"[<>=\[; ]", wanted)[0].lower().replace("_", "-")
        assert name in exact, f"{name} is not in constraints.txt"


@pytest.mark.parametrize("page", ["README.md", "docs/start/installation.md"])
def test_tables_of_extras_are_complete(page: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(PROJECT["project"]["optional-dependencies"]) <= set(rows)


def test_no_file_names_a_machine_or_an_index() -> None:
    assert "index-url" not in (ROOT / "constraints.txt").read_text()
