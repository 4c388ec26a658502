"""What training does to the codes: shares for the log of each leg."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.clipping import inside
from qexp.fake import FakeQuant
from qexp.learned import Rounded, behind, fake
from qexp.task import Task


class Movement:
    """Codes and scales of weights from one call to the next.

    clipped: weights beyond the ends of their grid. clipped_activations: values beyond those of
    static quantizers, in one forward of `probe`. flipped: weights whose code is another one than at
    the last call. oscillated: whose code moved against its last move. scale: of the scales'
    geometric mean, against the first call. `notes` holds all that is remembered between calls.
    """

    def __init__(
        self, task: Task, linears: Mapping[str, nn.Linear], probe: Callable[[], object]
    ) -> None:
        self.task, self.probe = task, probe
        self.linears = {
            name: linear for name, linear in linears.items() if isinstance(fake(linear), Rounded)
        }
        self.notes: dict[str, Any] = {"codes": {}, "moves": {}}

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The shares since the last call; the first one only looks."""
        return self._weights() | self._activations()

    def _activations(self) -> dict[str, float]:
        quantizers = [q for q in self.task.quantizers.values() if isinstance(q, FakeQuant)]
        static = [quantizer for quantizer in quantizers if not quantizer.dynamic]
        if not static:
            return {}
        seen: list[tuple[int, int]] = []

        def count(quantizer: FakeQuant, args: tuple[Any, ...]) -> None:
            q = quantizer.place()
            v = args[0].float() / q.scale + q.zero
            seen.append((_count(inside(v, *quantizer.grid.ends)), v.numel()))

        handles = [quantizer.register_forward_pre_hook(count) for quantizer in static]
        self.task.eval()  # no dropout, whose random state is training's
        try:
            self.probe()
        finally:
            self.task.train()
            for handle in handles:
                handle.remove()
        kept, total = (sum(column) for column in zip(*seen, strict=True))
        return {"clipped_activations": 1 - kept / total}

    def _weights(self) -> dict[str, float]:
        clipped = flipped = oscillated = total = 0
        before, moves = self.notes["codes"], self.notes["moves"]
        logs = []
        for name, linear in self.linears.items():
            rounded, weight = fake(linear), behind(linear)
            assert isinstance(rounded, Rounded)
            q = rounded.scales(weight)
            logs.append(q.scale.log().mean())
            low, high = rounded.grid.ends
            flat = q.map(lambda part: part.reshape(-1, 1))
            groups = weight.reshape(len(flat.scale), -1)
            v = groups / flat.scale + flat.zero
            clipped += weight.numel() - _count(inside(v, low, high))
            codes = rounded.grid.encode(groups, flat)
            move = (codes - before.get(name, codes)).sign_()
            last = moves.get(name, torch.zeros_like(move)).float()
            moved = move.abs()
            flipped += _count(moved)
            oscillated -= _count((move * last).clamp_(max=0))
            before[name] = codes.to(torch.uint8 if rounded.grid.bits <= 8 else torch.int32)
            moves[name] = last.addcmul(last, moved, value=-1).add_(move).to(torch.int8)
            total += weight.numel()
        if not total:
            return {}
        mean = float(torch.stack(logs).mean())
        start = self.notes.setdefault("start", mean)
        shares = {"clipped": clipped, "flipped": flipped, "oscillated": oscillated}
        scale = float(torch.tensor(mean - start).exp())
        return {name: count / total for name, count in shares.items()} | {"scale": scale}


def _count(ones: Float[Tensor, "*rows size"]) -> int:
    """Their sum; truth values, or all at once in double, would take many times longer."""
    return int(ones.sum(-1).sum(dtype=torch.float64))
