"""What training does to the codes: shares for the log of each leg."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qexp.learned import Rounded, behind, fake


class Movement:
    """Codes and scales of weights from one call to the next.

    clipped: weights beyond the ends of their grid. flipped: whose code is another one than at the
    last call. oscillated: whose code moved against its last move. scale: of the scales' geometric
    mean, against the first call.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = {
            name: linear for name, linear in linears.items() if isinstance(fake(linear), Rounded)
        }
        self.codes: dict[str, Tensor] = {}
        self.moves: dict[str, Tensor] = {}
        self.start: float | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The shares since the last call; the first one only looks."""
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
            clipped += int(((v < low) | (v > high)).sum())
            codes = rounded.grid.encode(groups, flat).to(torch.int32)
            move = torch.sign(codes - self.codes.get(name, codes)).to(torch.int8)
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
