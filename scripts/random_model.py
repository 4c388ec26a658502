"""A random Llama in bfloat16 shards: `python scripts/random_model.py OUT --blocks 28`."""

from qexp.cli import command

raise SystemExit(command("random-model"))
