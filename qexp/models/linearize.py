"""Normalization of loaded models: every linear map becomes an nn.Linear."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qexp.common.errors import UserError


def linearize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's `Conv1D` (weight stored [columns, rows]) by nn.Linear, in place.

    Logits are unchanged up to the order of summation; shared modules and weights stay shared. The
    state dict differs from that of the published checkpoint (weights are transposed).
    """
    linears: dict[int, nn.Linear] = {}
    weights: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() skips repeated modules
            if not isinstance(child, Conv1D):
                continue
            if id(child) not in linears:
                linears[id(child)] = _linear(child, weights)
            setattr(parent, name, linears[id(child)])
    return model


def _linear(conv: Conv1D, weights: dict[int, nn.Parameter]) -> nn.Linear:
    columns, rows = conv.weight.shape
    if id(conv.weight) not in weights:
        weights[id(conv.weight)] = nn.Parameter(
            conv.weight.detach().T.contiguous(), requires_grad=conv.weight.requires_grad
        )
    with torch.device("meta"):  # skips the initialization
        linear = nn.Linear(columns, rows)
    linear.weight, linear.bias = weights[id(conv.weight)], conv.bias
    return linear.train(conv.training)


def published(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict in the format of transformers: the inverse of `linearize`. UserError for a
    parameter that the family does not have (a bias that was added to hold a shift)."""
    with torch.device("meta"):
        family = type(model)(model.config)
    state = model.state_dict()
    for name in state.keys() - family.state_dict().keys():
        raise UserError(f"{name}: a {model.config.model_type} model folder has no place for it")
    transposed = _transposed(family)
    return {name: t.T.contiguous() if name in transposed else t for name, t in state.items()}


def has_transposed(model: PreTrainedModel) -> bool:
    """Whether the format of transformers transposes weights of the family (GPT-2)."""
    with torch.device("meta"):
        return bool(_transposed(type(model)(model.config)))


def _transposed(family: nn.Module) -> set[str]:
    return {
        f"{name}.weight" for name, module in family.named_modules() if isinstance(module, Conv1D)
    }
