"""Error of outliers, tensor by tensor: `python scripts/outliers.py OUT model=minilm data=sst2`."""

from qexp.cli import command

raise SystemExit(command("outliers"))
