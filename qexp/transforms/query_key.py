"""Learned scale between queries and keys, which leaves attention scores unchanged.

Source: OmniQuant (2308.13137), equation 5.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.task import Task
from qexp.transforms.channels import Channels


class QueryKey(nn.Module):
    """Divides rows of the query projection by exp(theta) and multiplies those of the keys by it.

    heads: the number of key heads. repeats: query heads per key head, which share its scale.
    rotary: the two channels that a rotary embedding rotates into each other share one theta.
    """

    def __init__(
        self, queries: Channels, keys: Channels, heads: int, repeats: int, rotary: bool
    ) -> None:
        super().__init__()
        self.queries, self.keys, self.repeats, self.rotary = queries, keys, repeats, rotary
        rows = keys.producer.get_parameter("weight")
        self.theta = nn.Parameter(rows.new_zeros(heads, len(rows) // heads // (1 + rotary)).float())

    def forward(self, repeats: int) -> Float[Tensor, " rows"]:
        theta = self.theta.repeat(1, 1 + self.rotary)
        return theta.repeat_interleave(repeats, 0).flatten().exp()

    @contextmanager
    def live(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.queries.live(lambda: self(self.repeats)))
            stack.enter_context(self.keys.live(lambda: 1 / self(1)))
            yield

    @torch.no_grad()
    def fold(self) -> None:
        self.queries.fold(self(self.repeats))
        self.keys.fold(1 / self(1))


def query_keys(task: Task, index: int) -> list[QueryKey]:
    """The query-key scale of block `index`; empty for fused projections and query or key norms."""
    arch, block = task.arch, task.blocks[index]
    names = arch.groups[0].linears  # the first group is the attention's
    if len(names) != 3 or any(norm.endswith(("q_norm", "k_norm")) for norm in arch.norms):
        return []
    config = task.model.config.get_text_config()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    queries, keys = (
        Channels(f"{arch.blocks}.{index}.{name}", block.get_submodule(name), ())
        for name in names[:2]
    )
    rotary = getattr(config, "rope_parameters", None) is not None
    return [QueryKey(queries, keys, shared, heads // shared, rotary)]
