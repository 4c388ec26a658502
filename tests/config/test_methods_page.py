"""The pages of docs/methods: every choice of what quantizes, and commands that compose."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.config.location import conf

PAGES = sorted((Path(__file__).parents[2] / "docs/methods").glob("*.md"))
GROUPS = (
    "transform",
    "method",
    "method/target",
    "method/residual",
    "method/adapter",
    "method/metric",
    "method/rule",
    "weight",
    "weight/range",
    "activation",
    "activation/placement",
    "activation/grid/range",
    "kv",
)


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_has_a_line(group: str) -> None:
    listed = []
    for line in (line for page in PAGES for line in page.read_text("utf-8").splitlines()):
        # the first line of a section, "`method=gptq` · GPTQ …", or the first cell of a row
        words = re.split(r" · | \| ", line.removeprefix("| "))[0]
        if re.fullmatch(rf"`{group}=\w+`(, `[\w/=]+`)*", words):
            listed += re.findall(r"`(?:[\w/]+=)?(\w+)`", words)
    assert sorted(listed) == sorted(p.stem for p in (conf() / group).glob("[!_]*.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_compose(page: Path) -> None:
    lines = re.findall(r"^qexp (.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert lines or page.stem == "index"
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word != "-m"]
        if words[0] == "ls":
            continue
        jobs: list[list[str]] = [[]]
        for word, parsed in zip(
            words, OverridesParser.create().parse_overrides(words), strict=True
        ):
            swept = parsed.is_sweep_override()
            values = (
                [f"{parsed.get_key_element()}={v}" for v in parsed.sweep_string_iterator()]
                if swept
                else [word]
            )
            jobs = [[*job, value] for job in jobs for value in values]
        for job in jobs:
            with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
                compose("config", job)
