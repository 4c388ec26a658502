"""Records of finished runs: `qexp record RUN… --topic NAME`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.common.errors import UserError
from qexp.runs import record
from qexp.runs.finished import collect

TO = Path("docs") / "records"


def main(arguments: Sequence[str]) -> None:
    """Writes TO/TOPIC/SIGNATURE.json for each finished run."""
    parser = argparse.ArgumentParser(prog="qexp record", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--topic", required=True, help="name of the folder below --to")
    parser.add_argument("--to", type=Path, default=TO, help=f"folder of all records; {TO}")
    chosen = parser.parse_args(arguments)
    if not re.fullmatch(r"[\w-][\w.-]*", chosen.topic):
        raise UserError(
            f"--topic {chosen.topic}: give one folder name, of letters, digits, - and _"
        )
    runs, notes = collect(chosen.runs)
    folders = [run.folder for run in runs if not run.recorded]
    for note in notes:
        print(note, file=sys.stderr)
    if not folders:
        names = ", ".join(map(str, chosen.runs))
        raise UserError(f"{names}: no finished run is there; run `qexp` first")
    contents: dict[str, tuple[Path, dict]] = {}
    for folder in folders:
        content = record.of(folder)
        name = content["signature"]
        if name in contents:
            raise UserError(
                f"{folder}: has the same configuration as {contents[name][0]}; name the one to "
                "record"
            )
        contents[name] = folder, content
    for name, (folder, content) in contents.items():
        path = chosen.to / chosen.topic / f"{name}.json"
        record.write(path, content)
        print(f"{path}  {path.stat().st_size / 1000:.1f} kB  {folder}")
        if unknown := record.unhashed(content):
            print(
                f"{path}: answers no job, since these input files are not here as the run read "
                f"them: {', '.join(unknown)}",
                file=sys.stderr,
            )
