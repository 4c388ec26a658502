"""Markers of generated parts in a Markdown page."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

KINDS = ("table", "figure", "value")
END = "<!-- qexp end -->"
OPEN = re.compile(r"<!--\s*qexp\s+(\w*)(.*?)(-->|\Z)", re.DOTALL)
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
SPAN = re.compile(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
ROW = re.compile(r"^[ \t]*\|.*$", re.M)
FIRST_CELL = re.compile(r"^[ \t]*\|[^|\n]*", re.M)
NUMBER = re.compile(r"\|\s*\**[-+~≈<>]?\d[\d.,]*(?:e[-+]?\d+)?\s*%?\**\s*(?=[|±(/†,])")


@dataclass(frozen=True)
class Block:
    """A marker and what stands between it and its end, `body`, in places of the page."""

    kind: str
    query: str  # yaml
    line: int  # of the marker, from 1
    inside: tuple[int, int]  # the places of the body
    outside: tuple[int, int]  # with both markers
    body: str

    @property
    def body_line(self) -> int:
        """The line on which the body begins."""
        return self.line + self.query.count("\n")


@dataclass(frozen=True)
class Problem:
    """A sentence about a line of a page."""

    line: int
    said: str


def parse(text: str) -> tuple[list[Block], list[Problem]]:
    """The blocks of a page, and what is wrong with its markers. Code is no marker."""
    blocks: list[Block] = []
    problems: list[Problem] = []
    opened: Block | None = None
    for match in OPEN.finditer(_without_code(text)):
        kind, line, (start, stop) = match[1], _line(text, match.start()), match.span()
        if not match[3]:
            problems.append(Problem(line, "the comment of the marker is not closed; add -->"))
            return blocks, problems
        if kind == "end" and opened is not None:
            inside = (opened.inside[0], start)
            outside = (opened.outside[0], stop)
            body = text[slice(*inside)]
            blocks.append(replace(opened, inside=inside, outside=outside, body=body))
            opened = None
            continue
        if opened is not None:
            problems.append(_unclosed(opened))
            opened = None
        if kind == "end":
            said = f"{END} ends nothing; remove it, or add the marker that it ends"
            problems.append(Problem(line, said))
        elif kind in KINDS:
            query = text[slice(*match.span(2))]
            opened = Block(kind, query, line, (stop, stop), (start, stop), "")
        else:
            said = f"qexp {kind or '…'} is no marker; use {', '.join(KINDS)} or end"
            problems.append(Problem(line, said))
    if opened is not None:
        problems.append(_unclosed(opened))
    return blocks, problems


def replaced(text: str, bodies: Iterable[tuple[Block, str]]) -> str:
    """The page with new bodies of its blocks, which are in order."""
    parts, at = [], 0
    for block, body in bodies:
        parts += [text[at : block.inside[0]], body]
        at = block.inside[1]
    return "".join([*parts, text[at:]])


def typed_tables(text: str) -> list[int]:
    """The first lines of tables with numbers that are not generated, pasted output included.

    A number in the first column is a label.
    """
    masked = text
    for block in parse(text)[0]:
        masked = _blank(masked, *block.outside)
    tables = [(start, FIRST_CELL.sub("", rows)) for start, rows in _tables(masked)]
    return [_line(text, start) for start, rows in tables if NUMBER.search(rows)]


def _tables(text: str) -> Iterator[tuple[int, str]]:
    """Place and body of each run of lines that begin with a bar."""
    start, end, rows = 0, -2, ""
    for match in ROW.finditer(text):
        if match.start() != end + 1:
            if rows:
                yield start, rows
            start, rows = match.start(), ""
        rows, end = f"{rows}{match[0]}\n", match.end()
    if rows:
        yield start, rows


def _unclosed(block: Block) -> Problem:
    said = f"qexp {block.kind} has no end; add {END} where the generated part ends"
    return Problem(block.line, said)


def _without_code(text: str) -> str:
    """The same length, with blanks instead of fenced code and of code in a line."""
    lines, fence = text.split("\n"), ""
    for at, line in enumerate(lines):
        found = FENCE.match(line)
        if fence:
            lines[at] = " " * len(line)
            if found and found[1].startswith(fence) and not line.strip(f"{fence[0]} \t"):
                fence = ""
        elif found:
            lines[at], fence = " " * len(line), found[1]
    text = "\n".join(lines)
    for match in list(SPAN.finditer(text)):
        text = _blank(text, *match.span())
    return text


def _blank(text: str, start: int, stop: int) -> str:
    return text[:start] + re.sub(r"[^\n]", " ", text[start:stop]) + text[stop:]


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
