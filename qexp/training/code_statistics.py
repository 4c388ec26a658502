"""Statistics of quantization codes and scales during training: clipping, flips, oscillations."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.grid.clipping import inside
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.parametrization import float_weight, weight_quantizer
from qexp.quantizers.weight import FakeWeight


class Snapshot(NamedTuple):
    """Statistics of the whole model, and of each tensor by its name."""

    whole: Mapping[str, float] = MappingProxyType({})
    tensors: Mapping[str, Mapping[str, float]] = MappingProxyType({})


class CodeStatistics:
    """Changes of codes and scales of weights, and of activation ranges, between calls.

    clipped: weights beyond the ends of their grid, or of the range fitted to them where that is
    done at every step: those whose gradient a hard clamp stops. flipped: weights whose code is
    another one than at the last call. oscillated: whose code moved against its last move. scale:
    the scales' geometric mean, against the first call. clipped_activations: values beyond the ends
    of static quantizers, in one run of `probe`; scale_activations: as scale, of those. Codes that
    are fixed have a scale alone, constant weights nothing. `notes` holds what is remembered between
    calls.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        quantizers: Mapping[str, nn.Module] = MappingProxyType({}),
        probe: Callable[[], object] = lambda: None,
    ) -> None:
        self.weights = {
            name: (weight_quantizer(linear), linear)
            for name, linear in linears.items()
            if not weight_quantizer(linear).is_constant
        }
        self.ranges = {
            name: quantizer
            for name, quantizer in quantizers.items()
            if isinstance(quantizer, FakeQuant) and not quantizer.dynamic
        }
        self.probe = probe
        self.notes: dict[str, Any] = {"codes": {}, "moves": {}, "starts": {}}

    @torch.no_grad()
    def __call__(self) -> Snapshot:
        """The shares since the last call; the first call is the reference."""
        whole: dict[str, float] = {}
        weights, sizes = {}, {}
        for name, (rounded, linear) in self.weights.items():
            weights[name] = self._weight(name, rounded, float_weight(linear))
            size = linear.in_features * linear.out_features
            sizes[name] = 0 if rounded.has_fixed_codes else size
        if total := sum(sizes.values()):
            for share in ("clipped", "flipped", "oscillated"):
                parts = (weights[name].get(share, 0.0) * size for name, size in sizes.items())
                whole[share] = sum(parts) / total
        ranges = {}
        if self.ranges:
            counts = self._count_inside()
            if total := sum(values for _, values in counts.values()):
                inside_all = sum(inner for inner, _ in counts.values())
                whole["clipped_activations"] = 1 - inside_all / total
            for name, quantizer in self.ranges.items():
                inner, values = counts.get(name, (0, 0))
                clipped = {"clipped": 1 - inner / values} if values else {}
                q = quantizer.place()
                ranges[name] = clipped | {"scale": self._against(name, q.scale)}
                ranges[name]["zero"] = float(q.zero.mean())
        for key, tensors in (("scale", weights), ("scale_activations", ranges)):
            if tensors:
                ratios = torch.tensor([each["scale"] for each in tensors.values()])
                whole[key] = float(ratios.double().log().mean().exp())
        return Snapshot(whole, weights | ranges)

    def _weight(
        self, name: str, rounded: FakeWeight, weight: Float[Tensor, "rows columns"]
    ) -> dict[str, float]:
        q = rounded.scales(weight)
        means = {"scale": self._against(name, q.scale), "zero": float(q.zero.float().mean())}
        if rounded.has_fixed_codes:
            return means
        before, moves = self.notes["codes"], self.notes["moves"]
        flat = q.map(lambda part: part.reshape(-1, 1))
        groups = rounded.unrounded(weight).reshape(len(flat.scale), -1)
        v = rounded.grid.position(groups, flat)
        size = weight.numel()
        clipped = size - _count(inside(v, 0, rounded.grid.top))
        codes = rounded.grid.encode(groups, flat)
        # codes from a checkpoint are on the CPU
        move = (codes - before.get(name, codes).to(codes.device)).sign_()
        last = moves.get(name, torch.zeros_like(move)).to(codes.device).float()
        moved = move.abs()
        oscillated = -_count((move * last).clamp_(max=0))
        before[name] = codes.to(torch.uint8 if rounded.grid.bits <= 8 else torch.int32)
        moves[name] = last.addcmul(last, moved, value=-1).add_(move).to(torch.int8)
        counts = {"clipped": clipped, "flipped": _count(moved), "oscillated": oscillated}
        return {share: count / size for share, count in counts.items()} | means

    def _count_inside(self) -> dict[str, tuple[int, int]]:
        """By quantizer, the numbers of values inside its bounds and of all values in one probe."""
        counts: dict[str, tuple[int, int]] = {}

        def counting(name: str, quantizer: FakeQuant) -> Any:
            def count(_: nn.Module, args: tuple[Any, ...]) -> None:
                q = quantizer.place()
                v = quantizer.grid.position(args[0].float(), q)
                kept, total = counts.get(name, (0, 0))
                kept += _count(inside(v, 0, quantizer.grid.top))
                counts[name] = kept, total + v.numel()

            return quantizer.register_forward_pre_hook(count)

        handles = [counting(*item) for item in self.ranges.items()]
        try:
            self.probe()
        finally:
            for handle in handles:
                handle.remove()
        return counts

    def _against(self, name: str, scale: Tensor) -> float:
        """The geometric mean of scales, relative to its value at the first call."""
        mean = float(scale.double().log().mean())
        start: float = self.notes["starts"].setdefault(name, mean)
        return float(torch.tensor(mean - start, dtype=torch.float64).exp())


def _count(ones: Float[Tensor, "*rows size"]) -> int:
    """The sum of zeros and ones: in two stages, as one sum in float64 or of bools is slower."""
    return int(ones.sum(-1).sum(dtype=torch.float64))
