"""Training batches in a seeded order, and the random state that resuming restores."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qexp.task import Batch


class SeededBatches(Dataset[Batch]):
    """Batches of `rows` sequences of a data set, in an order that depends only on the seed.

    The batches `first` … `first + count - 1` are distributed in turn to `ranks` processes. Each
    pass through the data has a new order.
    """

    def __init__(
        self,
        whole: Batch,
        rows: int,
        seed: int,
        first: int,
        count: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.whole, self.rows, self.seed = whole, rows, seed
        self.numbers = range(first + rank, first + count, ranks)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Batch:
        start = self.numbers[index] * self.rows
        total = len(next(iter(self.whole.values())))
        passes = range(start // total, (start + self.rows - 1) // total + 1)
        order = torch.cat([self._pass(number, total) for number in passes])
        chosen = order[start - passes[0] * total :][: self.rows]
        return {key: value[chosen] for key, value in self.whole.items()}

    def _pass(self, number: int, total: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(total, generator=generator)


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the CPU's random generator, and of the device's if it has one."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def restore_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu" and len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1].cpu(), device)


def stack(batches: Sequence[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
