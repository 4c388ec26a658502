"""`python -m qexp` is the console script `qexp`."""

from qexp.cli import main

main()
