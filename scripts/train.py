"""Train a float model, keep its folder: `python scripts/train.py NAME experiment=small_gpt2`."""

from qexp.cli import command

raise SystemExit(command("train"))
