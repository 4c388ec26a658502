"""Command `qexp ls [GROUP]`: groups of conf/, and the options of one with their papers."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from qexp.config import options

WIDTH = 100  # of lines, where the terminal is not narrower


def main(arguments: Sequence[str]) -> None:
    """Lists the groups of options; with GROUP its options, each with the first line of its file and
    its paper; with GROUP=OPTION that file."""
    parser = argparse.ArgumentParser("qexp ls", description=main.__doc__)
    parser.add_argument("group", nargs="?", help="method, method/hessian, weight=nf4 …")
    name = parser.parse_args(arguments).group
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 1)).columns)
    if name is None:
        print("\n".join(overview(width)))
        return
    group, equals, choice = name.partition("=")
    if equals:
        print(options.option(group, choice).text, end="")
        return
    print("\n".join(listing(group, width)))


def overview(width: int = WIDTH) -> Iterator[str]:
    """A line or more per group: its options, the default with an asterisk."""
    chosen = options.defaults()
    for name, found in options.groups().items():
        names = [f"{each.name}{'*' * (each.name == chosen.get(name))}" for each in found]
        yield from _wrapped(f"{name}: ", ", ".join(names), width, indent=4)
    yield ""
    yield "* by default. qexp ls GROUP describes its options, qexp ls GROUP=OPTION prints the file."


def listing(name: str, width: int = WIDTH) -> Iterator[str]:
    """A line or more per option of a group, then the groups below it."""
    found = options.group(name)
    longest = max(len(each.name) for each in found)
    for each in found:
        papers = ", ".join(f"arXiv:{paper}" for paper in each.papers)
        text = f"{each.summary} [{papers}]" if papers else each.summary
        yield from _wrapped(f"{each.name:<{longest}}  ", text, width, indent=longest + 2)
    if below := [each for each in options.groups() if each.startswith(f"{name}/")]:
        yield ""
        yield from _wrapped("groups below: ", ", ".join(below), width, indent=4)


def _wrapped(start: str, text: str, width: int, indent: int) -> list[str]:
    lines = textwrap.wrap(
        start + text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.rstrip() for line in lines]
