"""Records of finished runs: `python scripts/record.py outputs --topic NAME`."""

from qexp.cli import command

raise SystemExit(command("record"))
