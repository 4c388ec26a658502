"""What a run did to activations, drawn: `python scripts/ranges.py outputs/1a2b3c4d`."""

from qexp.commands.ranges import main

raise SystemExit(main())
