"""The command `qexp`: a command of `qexp.commands` by its name, else the Hydra application."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qexp.config.chains import as_choices
from qexp.sweeps import app
from qexp.sweeps.failures import run_reporting_errors

# name → module, whose `main(arguments)` returns an exit code or None
COMMANDS = {
    path.stem.replace("_", "-"): f"qexp.commands.{path.stem}"
    for path in sorted((Path(__file__).parent / "commands").glob("[a-z]*"))
}


def main() -> None:
    """The console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.exit(command(name, sys.argv[2:]))
    app.main()


def command(name: str, arguments: Sequence[str] | None = None) -> int:
    """The exit code of `qexp NAME`; `arguments` are those of this process by default."""
    given = as_choices(sys.argv[1:] if arguments is None else arguments)
    return run_reporting_errors(lambda: import_module(COMMANDS[name]).main(given))
