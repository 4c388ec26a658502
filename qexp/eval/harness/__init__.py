"""Tasks of the lm-evaluation-harness on the model in memory."""

from qexp.eval.harness.evaluator import Harness as Harness
