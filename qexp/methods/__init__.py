"""Quantization methods: steps that change a model in place and return a record per linear.

To add a method, implement `qexp.step.Step`, or a solver for `blockwise.Blockwise`; and one yaml in
conf/method/.
"""
