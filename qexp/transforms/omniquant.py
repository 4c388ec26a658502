"""OmniQuant (2308.13137): learnable weight clipping and channel scales, block by block."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.common.errors import UserError, check_choice, check_finite, check_int
from qexp.common.on_disk import assign
from qexp.grid import Grid
from qexp.grid.ranges import MinMax
from qexp.quantizers.maps import attention_group
from qexp.quantizers.scheme import Activations
from qexp.quantizers.scheme import FloatActivations as FloatActivations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES, channels_of
from qexp.transforms.heads import head_shape
from qexp.transforms.learned_maps import Banded, LearnedMap, LearnedValues
from qexp.transforms.learned_scales import Clipping, Shape
from qexp.transforms.query_key import QueryKey, query_keys
from qexp.transforms.reconstruction import Learned, Reconstruction, quantized
from qexp.transforms.scale_search import check_settings, first, on_device
from qexp.transforms.singular import Singular
from qexp.transforms.site_collection import collect_statistics
from qexp.transforms.site_statistics import SiteStatistics
from qexp.walk import Block, walk

log = logging.getLogger(__name__)

Piece = Shape | QueryKey | LearnedMap | LearnedValues | Singular


@dataclass(frozen=True)
class OmniQuant(Step):
    """Block-wise reconstruction of the float block's output with learned clipping and scales.

    shift: null is the reference's rule, shifts only where activations are quantized.
    query_key: with sites, also a scale between queries and keys, if they are separate linears. It
    affects neither inputs nor weights with one scale per row.
    augmented: adds the error to the float block's output for the quantized block's inputs
    (`aug_loss` of the reference code).
    heads, online: AffineQuant (2403.12544): with sites, also a matrix on each value head, which is
    folded, and one on the channels of each norm, which is computed in every forward pass. band:
    share of the epochs after which all of their entries are used; before, those near the diagonal;
    0: none. stability: factor of the entries.
    singular_rate: of trained increments of every linear's singular values (LSI, 2407.15508),
    folded; null: none. square: side of a trained corner of the matrix of singular values.

    Clipping changes the weights and so the float model's logits; scales and shifts do not. A solver
    must find the clipped range again, so weight.range must be minmax.
    """

    grid: Grid
    activation: Activations
    sites: str | None = None
    shift: bool | None = None
    query_key: bool = True
    augmented: bool = False
    epochs: int = 20
    batch: int = 1
    clip_rate: float = 1e-2
    scale_rate: float = 5e-3
    sequences: int | None = None
    seed: int = 0
    heads: bool = False
    online: bool = False
    band: float = 1.0
    stability: float = 0.01
    singular_rate: float | None = None
    square: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.sites is not None:
            check_choice("transform", self, sites=SITES)
        check_int("transform", self, epochs=1, batch=1, seed=0, square=0)
        check_finite(
            "transform", self, "clip_rate", "scale_rate"
        )  # at 0 nothing is learned of these
        check_finite("transform", self, "band", "stability")
        if self.singular_rate is not None:
            check_finite("transform", self, "singular_rate")
        elif self.square:
            raise UserError(
                f"transform.square={self.square}: a corner of singular values trains with the "
                "others; give transform.singular_rate=2e-4, or transform.square=0."
            )
        if (self.heads or self.online) and self.sites is None:
            raise UserError(
                "transform.sites=null: matrices follow channel scales; give norms+value, or "
                "transform.heads=false transform.online=false"
            )
        if self.grid.range != MinMax():
            raise UserError(
                f"weight.range={self.grid.range}: transform=omniquant learns bounds that only "
                "min-max reproduces; give weight/range=minmax."
            )
        if self.grid.second_level:
            raise UserError(
                "transform=omniquant: clipping cannot be learned with quantized scales; "
                "set weight.scales and weight.zeros to null."
            )

    @property
    def leaves_maps(self) -> bool:
        return self.online

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        generator = torch.Generator().manual_seed(self.seed)
        inputs: list[Tensor] = []  # of the quantized model
        for block in walk(task, first(batches(), self.sequences), self.batch):
            inputs = inputs or block.inputs
            sites = [] if self.sites is None else channels_of(task, block.index, self.sites)
            statistics = collect_statistics(block, sites, replay=False)
            with on_device(block):
                inputs = self._block(block, statistics, inputs, generator)
        return []

    def _block(
        self,
        block: Block,
        statistics: list[SiteStatistics],
        inputs: list[Tensor],
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Learn, change the block, and return what it makes with quantizers."""
        targets = [block.settled]
        if self.augmented:
            targets.append([block.replay(n, x).to(x.device) for n, x in enumerate(inputs)])
        reconstruction = Reconstruction(block, inputs, targets)
        shift = self.shift
        if shift is None:
            shift = not isinstance(self.activation, FloatActivations)
        # Increments come first: scales are of the changed weights.
        increments: list[Singular] = []
        if self.singular_rate is not None:
            increments = [Singular(linear, self.square) for linear in block.linears.values()]
        learned: list[Piece] = [*increments, *(Shape(site, shift) for site in statistics)]
        if statistics and self.query_key and not self.grid.rowwise:
            learned += query_keys(block.task, block.index)
        bands = [matrix.to(block.task.device) for matrix in self._matrices(block, learned)]
        clips = {name: Clipping(self.grid, linear.weight) for name, linear in block.linears.items()}
        groups = [
            {"params": [p for clip in clips.values() for p in clip.parameters()]}
            | {"lr": self.clip_rate},
        ]
        scaled = [p for piece in learned[len(increments) :] for p in piece.parameters()]
        if scaled:
            groups.append({"params": scaled, "lr": self.scale_rate})
        if self.singular_rate is not None:
            added = [p for piece in increments for p in piece.parameters()]
            groups.append({"params": added, "lr": self.singular_rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = self.epochs * len(inputs)

        def widen(step: int) -> None:
            done = (step // len(inputs) + 1) / (self.band * self.epochs) if self.band else 0.0
            for matrix in bands:
                matrix.band = int(matrix.size * min(done, 1.0))

        widen(0)
        with ExitStack() as stack:
            for piece in learned:
                stack.enter_context(piece.live())
            stack.enter_context(quantized(block, dict(clips), self.activation))
            before = reconstruction.total()
            named = _named(block, clips, learned)
            reconstruction.fit(optimizer, named, steps, generator, widen)
            log.info(
                "%s: error %.4g, to begin with %.4g", block.name, reconstruction.total(), before
            )
            outputs = [block.replay(n, x).to(x.device) for n, x in enumerate(inputs)]
        for piece in learned:
            piece.fold()
        for name, linear in block.linears.items():
            assign(linear.weight, clips[name].clamp(linear.weight.data))
        return outputs

    def _matrices(self, block: Block, learned: list[Piece]) -> list[Banded]:
        """AffineQuant's matrices, which are added to what is learned."""
        task, made = block.task, list[Banded]()
        output = attention_group(task)
        if self.heads and output.producer is not None and self.sites != "norms":
            size = head_shape(task, block.index)[1]
            heads = block.linears[output.producer].out_features // size
            made.append(Banded(size, heads, self.stability))
            learned.append(LearnedValues(block, made[-1]))
        for group in task.arch.groups:
            if self.online and group.producer in task.arch.norms:
                width = block.linears[group.linears[0]].in_features
                made.append(Banded(width, None, self.stability))
                learned.append(LearnedMap(block, group, [made[-1]]))
        return made


def _named(block: Block, clips: dict[str, Clipping], learned: list[Piece]) -> Learned:
    """What must have gradients: not matrices, of which few entries are used at first."""
    named: dict[str, Sequence[nn.Parameter]] = {
        f"{block.name}.{name}: ends": tuple(clip.parameters()) for name, clip in clips.items()
    }
    for piece in learned:
        if isinstance(piece, Shape | QueryKey):
            source = piece.queries if isinstance(piece, QueryKey) else piece.channels
            named |= {f"{source.name}: {name}": (p,) for name, p in piece.named_parameters()}
    return named
