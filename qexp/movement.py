"""What training does to the codes: shares for the log of each leg."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
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
    geometric mean, against the first call.
    """

    def __init__(
        self, task: Task, linears: Mapping[str, nn.Linear], probe: Callable[[], object]
    ) -> None:
        self.task, self.probe = task, probe
        self.linears = {
            name: linear for name, linear in linears.items() if isinstance(fake(linear), Rounded)
        }
        self.codes: dict[str, Tensor] = {}
        self.moves: dict[str, Tensor] = {}
        self.start: float | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The shares since the last call; the first one only looks."""
        return self._weights() | self._activations()

    def _activations(self) -> dict[str, float]:
        quantizers = [q for q in self.task.quantizers.values() if isinstance(q, FakeQuant)]
        static = [quantizer for quantizer in quantizers if not quantizer.dynamic]
        if not static:
            return {}
        seen: list[tuple[float, int]] = []

        def count(quantizer: FakeQuant, args: tuple[Any, ...]) -> None:
            q = quantizer.place()
            v = args[0].float() / q.scale + q.zero
            kept = inside(v, *quantizer.grid.ends).sum(dtype=torch.float64)
            seen.append((float(kept), v.numel()))

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
            clipped += weight.numel() - int(inside(v, low, high).sum(dtype=torch.float64))
            small = rounded.grid.bits <= 8
            codes = rounded.grid.encode(groups, flat).to(torch.uint8 if small else torch.int32)
            move = (codes.int() - self.codes.get(name, codes).int()).sign_().to(torch.int8)
            last = self.moves.get(name, torch.zeros_like(move))
            flipped += int((move != 0).sum())
            oscillated += int((move * last < 0).sum())
            self.codes[name] = codes
            self.moves[name] = torch.where(move != 0, move, last)
            total += weight.numel()
        if not total:
            return {}
        mean = float(torch.stack(logs).mean())
        self.start = mean if self.start is None else self.start
        shares = {"clipped": clipped, "flipped": flipped, "oscillated": oscillated}
        scale = float(torch.tensor(mean - self.start).exp())
        return {name: count / total for name, count in shares.items()} | {"scale": scale}
