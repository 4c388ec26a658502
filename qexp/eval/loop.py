"""The loop of every evaluation: forward passes as the `test_step` of a Lightning module."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader

from qexp.common import collectives, progress, ranks, trainers
from qexp.task import Task

Item = TypeVar("Item")
Result = TypeVar("Result")


class Measurement(L.LightningModule):
    """Calls `step` with each batch and keeps what it returns.

    The model is no submodule, so that Lightning leaves it where it is: an offloaded one has its
    blocks on the host.
    """

    def __init__(self, step: Callable[[Any], Any]) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches than ranks
        self.step = step
        self.results: list[Any] = []

    def test_step(self, batch: Any, index: int) -> None:
        self.results.append(self.step(batch))


def measured(
    task: Task, name: str, batches: Sequence[Item], step: Callable[[Item], Result]
) -> list[Result]:
    """What `step` returns for each batch, in order, without gradient.

    The batches are divided among the processes of the run, and each has all results. `step` gets
    the tensors of a batch on the task's device and must return results on the CPU. An exception of
    one process is raised in all.
    """
    rank, count = collectives.rank(), collectives.count()
    module = Measurement(step)
    own: DataLoader[Any] = DataLoader(
        batches[rank::count],  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda batch: batch,
        generator=torch.Generator(),  # the global one must not move
    )

    def work() -> list[Result]:
        with trainers.trainer(
            task.device,
            count // ranks.nodes(),
            strategy="auto" if count == 1 else "ddp",
            inference_mode=False,  # its tensors could not be trained with afterwards
            logger=False,
            callbacks=[progress.Bar(name)] if progress.drawn() else [],
        ) as trainer:
            trainer.test(module, own, verbose=False)
        return module.results

    parts = collectives.exchanged(work)
    return [parts[at % count][at // count] for at in range(len(batches))]
