"""Seconds and memory of a job by stage: `python scripts/bench.py blockwise model=smollm2`."""

from qexp.cli import command

raise SystemExit(command("bench"))
