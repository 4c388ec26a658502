"""Public names import from where they always did."""

import importlib

import pytest

NAMES = {
    "qexp.grid": ["IntGrid"],
    "qexp.solvers": ["GPTQ", "SpQR", "BiLLM", "Solution"],
    "qexp.hessian": ["Layerwise", "OutputAdaptive", "TokenWeighted"],
    "qexp.gradients": ["Straight", "Sigmoid", "Hard", "Soft"],
    "qexp.arch": ["ARCHS"],
    "qexp.walk": ["walk"],
    "qexp.pipeline": ["run"],
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_there(module):
    for name in NAMES[module]:
        assert hasattr(importlib.import_module(module), name)
