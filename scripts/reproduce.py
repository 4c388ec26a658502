"""Published tables again: `python scripts/reproduce.py gptq_opt --columns smollm2`."""

from qexp.cli import command

raise SystemExit(command("reproduce"))
