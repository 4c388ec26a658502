"""Hessians by layer and position: `python scripts/hessians.py OUT RUN model=smollm2 data=local`."""

from qexp.cli import command

raise SystemExit(command("hessians"))
