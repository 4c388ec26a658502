"""Weights of a block's output error by gradients of the model's divergence (BRECQ)."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils import ModelOutput

from qexp.quantizers.scheme import float_activations
from qexp.training.losses import LogitKL
from qexp.walk import Block
from qexp.walk.capture import bypass_blocks, replace_input


def output_importance(
    block: Block, chunk: int, output: Tensor, exact: Tensor
) -> Float[Tensor, "sequences tokens width"]:
    """(|g| + 1)² of one chunk (BRECQ, 2102.05426, section 3.3, and the 1 of its code).

    g: the gradient, at the block's quantized output, of KL(float model || model quantized up to
    this block), summed over positions. output, exact: of the quantized and of the float block.
    Later blocks are those that the model has, with float activations.
    """
    entry = output.detach().requires_grad_()
    with float_activations(block.task), torch.enable_grad():
        with torch.no_grad():
            teacher = _predictions(block, chunk, exact)
        predictions = _predictions(block, chunk, entry)
        positions = predictions.logits[..., 0].numel()
        divergence = LogitKL().distance(predictions, teacher) * positions
        [gradient] = torch.autograd.grad(divergence, entry)
    return gradient.abs().add(1).square()


def _predictions(block: Block, chunk: int, hidden: Tensor) -> ModelOutput:
    task, batch = block.task, block.chunks[chunk].batch
    inputs = {key: each.to(task.device) for key, each in batch.items() if key != "labels"}
    earlier = task.blocks[: block.index + 1]
    with bypass_blocks(earlier, block.returns_tuple), replace_input(task.blocks[0], hidden):
        return task.model(**inputs)
