"""Quadapter (2211.16912), phase 1: learned channel scales with frozen weights."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_choice, check_int, check_positive
from qexp.gradients import Straight
from qexp.grid import Grid
from qexp.quantizers.channel_scale import Alpha
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES, Channels, channels_of
from qexp.transforms.reconstruction import Reconstruction, quantized
from qexp.transforms.scale_search import check_settings, first, on_device, smoothed
from qexp.transforms.site_collection import collect_statistics
from qexp.transforms.site_statistics import SiteStatistics
from qexp.walk import Block, walk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quadapter(Step):
    """Learns alpha = exp(theta) per channel, for each block separately (phase 1 of the paper).

    The loss is the squared error between the quantized and the float block, both with the float
    block's input. Alpha is then folded into the norm (times alpha) and the linears (divided by
    alpha). If the final error is larger than with alpha = 1, the block keeps alpha = 1.

    grid: for the folded weights. activation: for the inputs of all linears; the range of each batch
    is used and differentiated.
    init: `ones`, or `smooth` (SmoothQuant's scale with its alpha = 0.5).
    steps, batch, rate: of Adam, with `batch` sequences per step; 0 steps keep the initial values.
    sequences: used from each calibration batch; null uses all.
    """

    grid: Grid
    activation: Activations
    sites: str = "norms"
    init: str = "ones"
    steps: int = 1000
    batch: int = 8
    rate: float = 1e-3
    sequences: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sites=SITES, init=("ones", "smooth"))
        check_int("transform", self, steps=0, batch=1, seed=0)
        check_positive("transform", self, "rate")

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        for block in walk(task, first(batches(), self.sequences), self.batch):
            self.adapt(block)
        return []

    @torch.no_grad()
    def adapt(self, block: Block) -> None:
        """Learns and folds the scales of one block.

        The order of its chunks depends only on the seed and the block's index.
        """
        generator = torch.Generator().manual_seed(self.seed + block.index)
        sites = channels_of(block.task, block.index, self.sites)
        # this also stores the float block's outputs in block.left
        statistics = collect_statistics(block, sites, replay=False)
        with on_device(block):
            starts = [self._start(site) for site in statistics]
            for channels, scale in self._learn(block, sites, starts, generator):
                channels.fold(scale)

    def _start(self, site: SiteStatistics) -> Float[Tensor, " channels"]:
        """The initial theta."""
        if self.init == "ones":
            return torch.zeros_like(site.largest)
        return -smoothed(site.largest, site.channels.weights(), 0.5).log()

    def _learn(
        self,
        block: Block,
        sites: list[Channels],
        starts: list[Float[Tensor, " _"]],
        generator: torch.Generator,
    ) -> list[tuple[Channels, Float[Tensor, " _"]]]:
        reconstruction = Reconstruction(block, block.inputs, [block.settled])
        alphas = [Alpha(torch.zeros_like(start)) for start in starts]
        rules = {
            name: lambda weight: self.grid(weight.float(), Straight()) for name in block.linears
        }
        with ExitStack() as stack:
            for channels, alpha in zip(sites, alphas, strict=True):
                stack.enter_context(channels.live(alpha))
            stack.enter_context(quantized(block, rules, self.activation))
            plain = reconstruction.total()
            for alpha, start in zip(alphas, starts, strict=True):
                alpha.theta.copy_(start)
            optimizer = torch.optim.Adam([alpha.theta for alpha in alphas], lr=self.rate)
            names = (f"{channels.name}: alpha" for channels in sites)
            named = {n: (alpha.theta,) for n, alpha in zip(names, alphas, strict=True)}
            reconstruction.fit(optimizer, named, self.steps, generator)
            learned = reconstruction.total()
        log.info("%s: error %.4g, with alpha = 1 %.4g", block.name, learned, plain)
        return (
            list(zip(sites, [a().detach() for a in alphas], strict=True)) if learned < plain else []
        )
