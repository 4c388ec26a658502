"""Image augmentation for training: random shifts and horizontal flips."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from qexp.common.errors import UserError, check_int
from qexp.task import Batch, Task
from qexp.training.losses import Objective


@dataclass(frozen=True)
class Augmented(Objective):
    """The task's own loss on augmented images during training.

    shift: largest shift in pixels; the border has the darkest value of the batch. flip: whether
    half of the images are mirrored. The augmentation depends on torch's global random state.
    """

    shift: int = 4
    flip: bool = True
    teacher = False

    def __post_init__(self) -> None:
        check_int(None, self, shift=0)

    def check(self, task: Task) -> None:
        if task.objective != "image_classification":
            raise UserError(
                f"method.loss: augmentation needs an image classifier and this model is "
                f"{task.objective}; give method/loss=cross_entropy."
            )

    def __call__(
        self, task: Task, teacher: PreTrainedModel | None, batch: Batch
    ) -> Float[Tensor, ""]:
        if not (task.training and torch.is_grad_enabled()):
            return task.loss(batch)
        return task.loss({**batch, "pixel_values": self.change(batch["pixel_values"])})

    def change(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images channels height width"]:
        count, _, height, width = images.shape
        device = images.device
        padded = F.pad(images, [self.shift] * 4, value=float(images.min()))
        down, right = (
            torch.randint(2 * self.shift + 1, (count, 1), device=device) for _ in range(2)
        )
        rows = down + torch.arange(height, device=device)
        columns = right + torch.arange(width, device=device)
        if self.flip:
            mirrored = torch.rand(count, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        each = torch.arange(count, device=device)[:, None, None]
        return padded[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
