"""What outliers cost, tensor by tensor: `python scripts/outliers.py OUT model=minilm data=sst2`."""

from qexp.commands.outliers import main

raise SystemExit(main())
