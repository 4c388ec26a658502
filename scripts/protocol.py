"""F-ID and F-OOD of the runs in some folders: `python scripts/protocol.py outputs --out here`."""

from qexp.commands.ood import main

raise SystemExit(main())
