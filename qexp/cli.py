"""The command `qexp`: one run, or a sweep with -m; and what is no run (`qexp cache`)."""

import sys
from importlib import import_module

from qexp.sweeps import app
from qexp.sweeps.failures import run_reporting_errors

# module whose `main` takes the rest of the line
COMMANDS = {
    "cache": "qexp.commands.cache",
    "diff": "qexp.commands.diff",
    "wandb-sweep": "qexp.commands.wandb_sweep",
}


def main() -> None:
    """The console script: a command by its name, everything else is the Hydra application."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.exit(run_reporting_errors(lambda: import_module(COMMANDS[name]).main(sys.argv[2:])))
    app.main()
