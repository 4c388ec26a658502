"""Everything that only an accelerator can tell, in one page: `python scripts/gpu.py`."""

from qexp.cli import command

raise SystemExit(command("gpu"))
