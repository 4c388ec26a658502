"""Pages whose tables, figures and values are generated from finished runs or their records."""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote, unquote

from qexp.common.errors import UserError
from qexp.report import formats, markers, origin, plots, spec, tables
from qexp.report.markers import Block, Problem
from qexp.report.pivot import differing
from qexp.report.query import Answer, ask, stored
from qexp.report.significance import compare
from qexp.report.spec import Spec
from qexp.runs.finished import Run, collect

WIDTH = 130
AGAIN = "Runs: those of an earlier part of this page."
LISTED = re.compile(r"<!-- runs in (\S+): ([^>]*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page as it is and as it should be. `files`: figures. `problems`: why it cannot be made.
    `differences`: what in the page is not what the runs give. `missing`: runs that it lists."""

    path: Path
    text: str
    made: str
    blocks: Sequence[Block]
    files: dict[Path, bytes]
    problems: Sequence[Problem]
    differences: Sequence[Problem]
    missing: Sequence[Problem]


@dataclass
class Library:
    """Runs by the folders that hold them, each read once."""

    known: dict[tuple[str, ...], list[Run]] = field(default_factory=dict)

    def runs(self, folders: tuple[str, ...]) -> list[Run]:
        """Raises UserError for an absent folder, for one without runs and for an unreadable run."""
        if folders not in self.known:
            runs, notes = collect(map(Path, folders))
            if notes:
                raise UserError(f"records: {notes[0]}; restore it, or remove it")
            if not runs:
                raise UserError(f"records {', '.join(folders)}: no finished run or record is there")
            self.known[folders] = runs
        return self.known[folders]


@dataclass
class _Maker:
    """The parts of one page, in order: what an earlier part says is not repeated."""

    page: Path
    library: Library
    listed: list[set[Path]] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    files: dict[Path, bytes] = field(default_factory=dict)

    def part(self, kind: str, wanted: Spec) -> str:
        """What stands between the markers. Raises UserError for a query without an answer."""
        runs = self.library.runs(wanted.records)
        makers: dict[str, Callable[[Spec, Sequence[Run]], str]]
        makers = {"table": self.table, "figure": self.figure, "value": _value}
        return makers[kind](wanted, runs)

    def table(self, wanted: Spec, runs: Sequence[Run]) -> str:
        answer = ask(runs, wanted.query)
        sheet = tables.lay(answer.table, answer.baselines, wanted.style)
        titles = sheet.titles
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise UserError(
                f"titles: two columns are titled {twice[0]}; a protocol with two definitions has "
                "two columns: narrow `where`, or leave out the title"
            )
        return self._with_origin(formats.markdown(sheet), answer.legend(sheet), answer, wanted)

    def figure(self, wanted: Spec, runs: Sequence[Run]) -> str:
        answer = ask(runs, wanted.query)
        settings, path = answer.table.settings, self.page.parent / wanted.file
        if path in self.files:
            raise UserError(f"file: {wanted.file}: another figure of this page has this name")
        if all(math.isnan(setting.value(wanted.x)) for setting in settings):
            raise UserError(f"x {wanted.x}: no run has this number; give a metric or a key")
        picture = plots.against_bits(settings, answer.table.columns, wanted.x)
        self.files[path] = picture.content(path.suffix)
        names = ", ".join(column.name for column in answer.table.columns)
        alt = wanted.alt or f"{names} against {wanted.x}"
        return self._with_origin(f"![{alt}]({wanted.file})", [plots.BARS], answer, wanted)

    def _with_origin(self, shown: str, legend: Sequence[str], answer: Answer, wanted: Spec) -> str:
        """The legend, notes about the models, then commands, commits, machines, protocols, runs."""
        settings = list(answer.table.settings)
        used = [answer.baselines[id(s)] for s in settings if id(s) in answer.baselines]
        settings += [each for each in used if each not in settings]
        runs = list({run.folder: run for each in settings for run in each.runs}.values())
        notes = [note for note in [*legend, *stored(settings)] if note not in self.notes]
        self.notes.update(notes)
        parts = [shown, *([_wrapped(" ".join(notes))] if notes else [])]
        if any({run.folder for run in runs} <= earlier for earlier in self.listed):
            parts.append(AGAIN)  # which lists them
        else:
            self.listed.append({run.folder for run in runs})
            parts.append("\n".join(["```", *origin.commands(runs), "```"]))
            names = [column.name for column in answer.table.columns]
            facts = {
                "Commit": origin.commits(runs),
                "Machine": origin.machines(runs),
                "Protocols": origin.protocols(runs, names),
            }
            said = [f"{fact}: {'; '.join(known)}." for fact, known in facts.items() if known]
            parts += [_wrapped(" ".join(said)), _listing(runs, wanted.records)]
        return "\n\n".join(["", *parts, ""])


def make(path: Path, text: str, library: Library) -> Page:
    """The page with its parts made again."""
    blocks, problems = markers.parse(text)
    maker = _Maker(path, library)
    bodies: list[tuple[Block, str]] = []
    differences: list[Problem] = []
    missing: list[Problem] = []
    for block in blocks:
        before = set(maker.files)
        try:
            body = maker.part(block.kind, spec.read(block.kind, block.query))
        except UserError as error:
            problems.append(Problem(block.line, str(error)))
            continue
        bodies.append((block, body))
        lost = [Problem(block.line, _missing(place)) for place in _lost(block)]
        missing += lost
        if body != block.body and not lost:
            differences.append(_difference(block, body))
        for file in maker.files.keys() - before:
            if not file.is_file():
                differences.append(Problem(block.line, f"the figure {file} is missing"))
            elif file.read_bytes() != maker.files[file]:
                said = f"the figure {file} is not the one that the records give"
                differences.append(Problem(block.line, said))
    made = markers.replaced(text, bodies)
    return Page(path, text, made, blocks, maker.files, problems, differences, missing)


def _value(wanted: Spec, runs: Sequence[Run]) -> str:
    """One number of the one setting that meets the query, or its difference from the baseline."""
    [name], digits = wanted.query.metrics, wanted.style.digits
    answer = ask(runs, replace(wanted.query, metrics=()))
    settings = answer.table.settings
    if len(settings) > 1:
        keys = ", ".join(differing(settings))
        raise UserError(f"where: {len(settings)} settings meet it; they differ in {keys}")
    [setting] = settings
    columns = [column for column in answer.table.columns if column.name == name]
    if len(columns) > 1:
        raise UserError(f"metrics {name}: was measured under several definitions; narrow `where`")
    if not columns or wanted.show == "mean":
        value = setting.spread(columns[0]).mean if columns else setting.value(name)
        if math.isnan(value):
            there = ", ".join(setting.run.metrics)
            raise UserError(f"metrics {name}: not measured; there are {there}")
        return tables.number(value) if digits is None else f"{value:.{digits}f}"
    if wanted.show == "spread":
        return tables.spread(setting, columns[0], digits)
    baseline = answer.baselines.get(id(setting))
    moved = compare(setting, baseline, columns[0]) if baseline is not None else None
    if moved is None or (wanted.show == "interval" and not moved.tested):
        needed = "two shared seeds" if wanted.show == "interval" else "a shared seed"
        raise UserError(f"show {wanted.show}: there is no baseline with {needed}")
    return moved.interval() if wanted.show == "interval" else tables.signed(moved)


def _listing(runs: Sequence[Run], folders: Sequence[str]) -> str:
    """A comment with the place of each run, so that a lost one is noticed."""
    lines, left = [], {run.folder for run in runs}
    for top in folders:
        inside = {place for place in left if place.is_relative_to(top)}
        left -= inside
        names = sorted(quote(place.relative_to(top).as_posix()) for place in inside)
        if names:
            text = f"<!-- runs in {quote(top)}: {' '.join(names)} -->"
            lines.append(_wrapped(text))
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def _lost(block: Block) -> list[Path]:
    """Runs that the part lists and that are not there any more."""
    found = [(top, name) for top, names in LISTED.findall(block.body) for name in names.split()]
    listed = [Path(unquote(top), unquote(name)) for top, name in found]
    return [place for place in listed if not place.exists()]


def _missing(place: Path) -> str:
    return f"{place} is missing"


def _difference(block: Block, body: str) -> Problem:
    """The first line of the part that is not as it was made; of a table's row, the first cell."""
    is_lines, should_lines = block.body.split("\n"), body.split("\n")
    pairs = list(zip_longest(is_lines, should_lines, fillvalue=""))
    at = next(i for i, (given, made) in enumerate(pairs) if given != made)
    given, made = pairs[at]
    cells = list(zip(given.split("|"), made.split("|"), strict=False))
    if given.count("|") == made.count("|") > 1:
        given, made = next(pair for pair in cells if pair[0] != pair[1])
    line = min(block.body_line + at, block.body_line + len(is_lines) - 1)
    if not block.body.strip():
        return Problem(line, f"the {block.kind} is not written yet")
    shown = " ".join(given.split()) or "nothing", " ".join(made.split()) or "nothing"
    return Problem(line, "is: {}; the records give: {}".format(*shown))
