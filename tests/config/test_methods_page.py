"""docs/methods.md: a line for every choice of what quantizes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    for line in (ROOT / "docs/methods.md").read_text().splitlines():
        if line.startswith(f"| `{group}="):
            assert len(re.split(r"(?<!\\)\|", line)) == 7, f"five cells: {line}"
            listed += re.findall(r"`(?:[\w/]+=)?(\w+)`", line.split("|")[1])
    assert sorted(listed) == sorted(p.stem for p in (ROOT / "conf" / group).glob("[!_]*.yaml"))
