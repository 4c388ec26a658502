"""Generated tables, figures and values of Markdown pages: written, checked or listed."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.report import markers
from qexp.report.documents import Library, Page, make
from qexp.report.markers import Problem

README = Path("README.md")
DOCS = Path("docs")
REPAIR = "`qexp docs {page}` writes what the records give"
RESTORE = "restore it, or write the page without it by `qexp docs {page}`"


def main(arguments: Sequence[str]) -> int:
    """The command line of `qexp docs`; 1 where a page is not as its records make it."""
    parser = argparse.ArgumentParser(prog="qexp docs", description=__doc__)
    parser.add_argument(
        "pages", nargs="*", type=Path, help=f"or folders; {README} and {DOCS} by default"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    only.add_argument("--list", action="store_true", help="generated parts, and typed tables")
    chosen = parser.parse_args(arguments)
    texts = {page: _text(page) for page in pages(chosen.pages or [README, DOCS])}
    if chosen.list:
        print("\n".join(summary(page, text) for page, text in texts.items()))
        return 0
    library = Library()
    made = [make(page, text, library) for page, text in texts.items()]
    if chosen.check:
        return check(made)
    return write(made)


def pages(named: Iterable[Path]) -> list[Path]:
    """Markdown files, and those at any depth of folders. Raises UserError for another name."""
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            found += sorted(path.rglob("*.md"))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: is no page; run this in the folder of {README} and {DOCS}/")
    return list(dict.fromkeys(found))


def check(made: Sequence[Page]) -> int:
    """Prints a sentence for each problem; 1 if there are any."""
    failed = 0
    for page in made:
        failed += _print(page, page.problems)
        failed += _print(page, page.missing, RESTORE)
        failed += _print(page, page.differences, REPAIR)
    if not failed:
        parts = _counted(block for page in made for block in page.blocks)
        print(f"{len(made)} pages, generated: {parts}; all as the records give them")
    return int(failed > 0)


def write(made: Sequence[Page]) -> int:
    """Writes the pages that change and their figures; nothing and 1 if a page has a problem."""
    if sum(_print(page, page.problems) for page in made):
        print("nothing was written", file=sys.stderr)
        return 1
    for page in made:
        _print(page, page.missing, "the page is written without it")
        changed = {
            path: content
            for path, content in page.files.items()
            if not path.is_file() or path.read_bytes() != content
        }
        if page.made != page.text:
            changed[page.path] = page.made.encode()
        for path, content in changed.items():
            with atomic(path) as temporary:
                temporary.write_bytes(content)
            print(f"{path}: written")
    return 0


def summary(page: Path, text: str) -> str:
    """What of a page is generated, and its tables with numbers that are typed."""
    blocks, _ = markers.parse(text)
    typed = markers.typed_tables(text)
    lines = f" (lines {', '.join(map(str, typed))})" if typed else ""
    return f"{page}: generated: {_counted(blocks)}; typed tables with numbers: {len(typed)}{lines}"


def _counted(blocks: Iterable[markers.Block]) -> str:
    counts = Counter(block.kind for block in blocks)
    parts = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items()]
    return ", ".join(parts) or "nothing"


def _print(page: Page, problems: Sequence[Problem], repair: str = "") -> int:
    for problem in problems:
        tail = f"; {repair.format(page=page.path)}" if repair else ""
        print(f"{page.path}:{problem.line}: {problem.said}{tail}", file=sys.stderr)
    return len(problems)


def _text(page: Path) -> str:
    try:
        return page.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{page}: cannot be read as text ({error}); save it as UTF-8") from error
