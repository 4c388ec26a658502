"""Groups and options of conf/, and what the comments of their files say."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.config.location import conf
from qexp.config.messages import nearest

PAPER = re.compile(r"(?<![\w./-])\d{4}\.\d{4,5}(?![\w./-])")  # an identifier of arXiv
IN_TEXT = re.compile(rf" \({PAPER.pattern}\)|, {PAPER.pattern}(?=\))")
COMMAND = re.compile(r"(?:qexp|python|torchrun|pip|bash) ")


@dataclass(frozen=True)
class Option:
    """One yaml of a group."""

    group: str
    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """The file."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def head(self) -> list[str]:
        """The comment lines at the top of the file, without their signs."""
        lines: list[str] = []
        for line in self.text.splitlines():
            if line.startswith("# @package"):
                continue
            if not line.startswith("#"):
                if not lines and "#" in line:  # `{} # a comment` is a whole file
                    lines.append(line.partition("#")[2].strip())
                break
            lines.append(line.removeprefix("#").removeprefix(" "))
        return lines

    @property
    def title(self) -> str:
        """The first line of the comment, with the rest of its sentence; empty without a comment."""
        lines: list[str] = []
        for line in self.head:
            if lines and (not line.strip() or COMMAND.match(line.strip())):
                break
            lines.append(line.strip())
            if line.rstrip().endswith((".", ":")):
                break
        return " ".join(lines)

    @property
    def summary(self) -> str:
        """The title without identifiers of papers."""
        return IN_TEXT.sub("", self.title)

    @property
    def papers(self) -> list[str]:
        """Identifiers of arXiv in the comment, in order."""
        return list(dict.fromkeys(PAPER.findall("\n".join(self.head))))

    @property
    def examples(self) -> list[str]:
        """The commands in the comment, with their remarks."""
        return [line.strip() for line in self.head if COMMAND.match(line.strip())]


def groups() -> dict[str, list[Option]]:
    """The options of each group by its name, such as `method/hessian`; without the shared parts of
    options, whose names begin with `_`."""
    found: dict[str, list[Option]] = {}
    for option in _options(conf()):
        found.setdefault(option.group, []).append(option)
    return found


def group(name: str) -> list[Option]:
    """The options of one group. Raises UserError for an unknown one."""
    known = groups()
    if name not in known:
        raise UserError(f"{name}: there is no such group; {nearest(name, known)}")
    return known[name]


def option(name: str, choice: str) -> Option:
    """One option of a group. Raises UserError for an unknown one."""
    found = {each.name: each for each in group(name)}
    if choice not in found:
        raise UserError(f"{name}={choice}: there is no such choice; {nearest(choice, found)}")
    return found[choice]


def defaults() -> dict[str, str]:
    """The option of each group that a run takes by default."""
    chosen: dict[str, str] = {}
    for entry in OmegaConf.load(conf() / "config.yaml").defaults:
        if OmegaConf.is_dict(entry):
            chosen |= {str(key): str(value) for key, value in entry.items() if value is not None}
    return chosen


def _options(top: Path) -> Iterator[Option]:
    for path in sorted(top.rglob("*.yaml")):
        folder = path.parent.relative_to(top).as_posix()
        if folder != "." and not path.name.startswith("_"):
            yield Option(folder, path.stem, path)
