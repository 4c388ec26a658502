"""Channel ranges of activations in a run: `python scripts/ranges.py outputs/1a2b3c4d`."""

from qexp.cli import command

raise SystemExit(command("ranges"))
