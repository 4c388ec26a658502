"""What a run changed in a model beside the weights it coded, and how to change it again."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from qexp.common.cache import checksum

Checksums = Mapping[str, str]


def checksums(model: nn.Module) -> Checksums:
    """A checksum of every parameter and buffer; one that is shared counts once, by its first
    name."""
    return {name: checksum({"": tensor}) for name, tensor in _tensors(model).items()}


def state_diff(model: nn.Module, before: Checksums, coded: Collection[str]) -> dict[str, Tensor]:
    """Every tensor that is new or another one since `before`, without the weights of the linears
    named in `coded`. A tensor that was shared and no longer is counts as new."""
    kept = {f"{name}.weight" for name in coded}
    return {
        name: tensor.detach()
        for name, tensor in _tensors(model).items()
        if name not in kept and before.get(name) != checksum({"": tensor})
    }


def added(model: nn.Module, before: Collection[str]) -> int:
    """How many numbers the model keeps in parameters that it did not have; `before` names those of
    then. Its untied head counts, and so does a bias that a shift needed."""
    return sum(p.numel() for name, p in model.named_parameters() if name not in before)


def apply_diff(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Make the model of `marks` the model of `edits`: values in place, new parameters (an untied
    head, a bias) registered under their names."""
    present = _tensors(model)
    for name, tensor in changed.items():
        if name in present:
            present[name].data = tensor.to(present[name])
            continue
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, nn.Parameter(tensor, requires_grad=False))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
