"""Table and plot of the runs in some folders: `python scripts/report.py outputs --out here`."""

from qexp.cli import command

raise SystemExit(command("report"))
