"""Tensors that a run changed apart from the quantized weights, and applying them again."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from qexp.common.cache import checksum
from qexp.common.on_disk import assign

Checksums = Mapping[str, str]


def checksums(model: nn.Module) -> Checksums:
    """A checksum of every parameter and buffer; a shared one is listed once, by its first name."""
    return {name: checksum({"": tensor}) for name, tensor in _tensors(model).items()}


def state_diff(model: nn.Module, before: Checksums, coded: Collection[str]) -> dict[str, Tensor]:
    """Every tensor that is new or changed since `before`, without the weights of the linears named
    in `coded`. A tensor that is no longer shared counts as new."""
    excluded = {f"{name}.weight" for name in coded}
    return {
        name: tensor.detach()
        for name, tensor in _tensors(model).items()
        if name not in excluded and before.get(name) != checksum({"": tensor})
    }


def added(model: nn.Module, before: Collection[str]) -> int:
    """How many numbers the model keeps in parameters that it did not have; `before` names those of
    then. Its untied head counts, and so does a bias that a shift needed."""
    return sum(p.numel() for name, p in model.named_parameters() if name not in before)


def apply_diff(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Apply a `state_diff` to the original model: values in place; new parameters (an untied head,
    a bias) are registered under their names."""
    present = _tensors(model)
    for name, tensor in changed.items():
        if name in present:
            assign(present[name], tensor)
            continue
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
