"""What outliers cost, tensor by tensor: `python scripts/outliers.py OUT model=minilm data=sst2`."""

from qexp.problem_tensors import main

raise SystemExit(main())
