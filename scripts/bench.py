"""What jobs cost: `python scripts/bench.py blockwise method=gptq model=smollm2`."""

from qexp.commands.bench import main

main()
