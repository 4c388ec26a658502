"""Table and plot of the runs in some folders: `python scripts/report.py outputs --out here`."""

from qexp.commands.report import main

raise SystemExit(main())
