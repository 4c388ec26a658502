"""Channels that stand out, planted in tiny models, and measures of what a transform changes."""

import torch
from helpers.models import task_of

from qexp.grid import IntGrid
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.scheme import QuantizedActivations
from qexp.transforms.channels import SITES, channels_of

NORMS, VALUES, ALL = SITES


def close(one: torch.Tensor, two: torch.Tensor, share: float) -> None:
    assert float((one - two).norm() / two.norm()) < share


def every(task, sites):
    return [c for index in range(len(task.blocks)) for c in channels_of(task, index, sites)]


def logits(task, batch) -> torch.Tensor:
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        inputs = {k: v.to(task.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return task.model(**inputs).logits


def random_scale(channels, seed: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = channels.linears[0].in_features // channels.repeats
    return torch.randn(columns, generator=generator).exp().to(dtype)


TENSOR = QuantizedActivations(LinearInputs(), IntGrid(8, per_tensor=True))


def planted(family: str, size: float = 50):
    """Two channels of every norm's output are `size` times what they were, undone by the weights:
    the function of the tiny model, with activations as large models have them."""
    task = task_of(family)
    for index in range(len(task.blocks)):
        for channels in channels_of(task, index, NORMS):
            scale = torch.ones(channels.linears[0].in_features)
            scale[3] = scale[17] = 1 / size
            channels.fold(scale)
    return task


def drift(task, batch, expected) -> float:
    return float((logits(task, batch) - expected).square().mean())
