"""Published tables again: `python scripts/reproduce.py gptq_opt --columns smollm2`."""

from qexp.commands.reproduce import main

raise SystemExit(main())
