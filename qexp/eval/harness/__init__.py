"""Zero-shot and few-shot tasks of EleutherAI's lm-evaluation-harness."""

from qexp.eval.harness.evaluator import Harness as Harness
