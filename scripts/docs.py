"""Tables and figures of documents, from records: `python scripts/docs.py --check`."""

from qexp.cli import command

raise SystemExit(command("docs"))
