"""F-ID and F-OOD of the runs in some folders: `python scripts/ood.py outputs --out here`."""

from qexp.cli import command

raise SystemExit(command("ood"))
