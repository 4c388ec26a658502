"""FlatQuant (2410.09426): learned online maps, channel scales and clipping, block by block."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from qexp.common.errors import UserError, check_finite, check_int
from qexp.common.on_disk import assign
from qexp.gradients import Straight
from qexp.grid import Grid
from qexp.grid.ranges import MinMax
from qexp.quantizers.maps import attention_group, refuse_mapped
from qexp.quantizers.online import balanced
from qexp.quantizers.placement import input_name
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.activation_clip import ActivationClip, is_learnable
from qexp.transforms.channels import Channels, channels_of
from qexp.transforms.heads import head_shape
from qexp.transforms.learned_maps import Invertible, LearnedKeys, LearnedMap, LearnedValues
from qexp.transforms.learned_scales import Clipping, Shape
from qexp.transforms.reconstruction import Reconstruction, quantized, rounded_cache, rounds_cache
from qexp.transforms.scale_search import check_settings, first, on_device
from qexp.transforms.site_collection import collect_statistics
from qexp.transforms.site_statistics import SiteStatistics
from qexp.walk import Block, walk

log = logging.getLogger(__name__)

MAPS = ("norms", "heads", "down", "keys", "values")
Piece = Shape | LearnedMap | LearnedKeys | LearnedValues


@dataclass(frozen=True)
class FlatQuant(Step):
    """Learn, in each block, what makes its quantized output that of the float block, both on the
    float model's inputs.

    maps: `norms` and `down`, Kronecker products of two factors on what the linears behind a norm
    and the last linear of the MLP read; `heads`, a matrix across the heads that the output
    projection reads; `values`, one on each value head, folded; `keys`, one on each head of keys and
    queries, learned where `kv` rounds a cache. diagonals: a scale per channel before the maps of
    `norms` and `down`, folded into what produces the channels. clip: learned ends of the weights'
    ranges, as in OmniQuant. activation_clip: learned shares of both ends of the inputs' ranges, for
    each site, where ranges are dynamic.
    rate, clip_rate: of AdamW, for maps and scales and for the ends; cosine to a thousandth.
    weight_decay: 0.01 is what the reference's optimizer has by default.

    Maps alone do not change the function, clipping does. A solver must find the clipped range
    again, so weight.range must be minmax.
    """

    grid: Grid
    activation: Activations
    kv: Activations
    maps: tuple[str, ...] | list[str] = MAPS
    diagonals: bool = True
    clip: bool = True
    activation_clip: bool = True
    epochs: int = 15
    batch: int = 4
    rate: float = 5e-3
    clip_rate: float = 5e-2
    weight_decay: float = 0.01
    sequences: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        check_int("transform", self, epochs=1, batch=1, seed=0)
        check_finite("transform", self, "rate", "clip_rate", "weight_decay")
        if unknown := set(self.maps) - set(MAPS):
            raise UserError(
                f"transform.maps={list(self.maps)}: {sorted(unknown)[0]} is unknown; give a list "
                f"of {', '.join(MAPS)}."
            )
        if self.clip and self.grid.range != MinMax():
            raise UserError(
                f"weight.range={self.grid.range}: transform=flatquant learns bounds that only "
                "min-max reproduces; give weight/range=minmax, or transform.clip=false."
            )
        if self.clip and self.grid.second_level:
            raise UserError(
                "transform=flatquant: clipping cannot be learned with quantized scales; set "
                "weight.scales and weight.zeros to null, or give transform.clip=false."
            )

    @property
    def leaves_maps(self) -> bool:
        return bool(set(self.maps) - {"values"})

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        for index in range(len(task.blocks)):
            for group in task.arch.groups:
                refuse_mapped(task, index, group)
        generator = torch.Generator().manual_seed(self.seed)
        for block in walk(task, first(batches(), self.sequences), self.batch):
            statistics = collect_statistics(block, self._scaled(block), replay=False)
            with on_device(block):
                self._learn(block, statistics, generator)
        return []

    def _scaled(self, block: Block) -> list[Channels]:
        """The channels that a diagonal can scale: those of norms, and of up where it exists."""
        task, arch = block.task, block.task.arch
        if not self.diagonals:
            return []
        found = channels_of(task, block.index, "norms+value+up") if not arch.post_norm else []
        output = block.linears[arch.writers[0]]
        wanted = {"norms": "norms" in self.maps, "down": "down" in self.maps}
        last = block.linears[arch.writers[-1]]
        return [
            channels
            for channels in found
            if output not in channels.linears
            and wanted["down" if last in channels.linears else "norms"]
        ]

    def pieces(
        self, block: Block, statistics: Sequence[SiteStatistics], generator: torch.Generator
    ) -> list[Piece]:
        """What trains in a block, in the order in which it is folded."""
        task, arch = block.task, block.task.arch
        heads, size = head_shape(task, block.index)
        output = attention_group(task)
        made: list[Piece] = [Shape(site, shift=False, alpha=0.3) for site in statistics]
        if "values" in self.maps and output.producer is not None:
            made.append(LearnedValues(block, Invertible(size, generator)))
        for group in arch.groups:
            if group == output:
                if "heads" in self.maps:
                    made.append(LearnedMap(block, group, [Invertible(heads, generator), size]))
            elif ("down" if group == arch.groups[-1] else "norms") in self.maps:
                sides = balanced(block.linears[group.linears[0]].in_features)
                made.append(LearnedMap(block, group, [Invertible(n, generator) for n in sides]))
        if "keys" in self.maps and rounds_cache(self.kv):
            made.append(LearnedKeys(block, Invertible(size, generator)))
        return [piece.to(task.device) for piece in made]

    def _learn(
        self, block: Block, statistics: Sequence[SiteStatistics], generator: torch.Generator
    ) -> None:
        reconstruction = Reconstruction(block, block.inputs, [block.settled], normalized=True)
        pieces = self.pieces(block, statistics, generator)
        clips = {
            name: Clipping(self.grid, linear.weight)
            for name, linear in block.linears.items()
            if self.clip
        }
        rules = {
            name: clips[name] if self.clip else lambda weight: self.grid(weight.float(), Straight())
            for name in block.linears
        }
        named = {
            f"{block.name}, {type(piece).__name__} {number}, {name}": (parameter,)
            for number, piece in enumerate(pieces)
            for name, parameter in piece.named_parameters()
        } | {f"{block.name}.{name}: ends": tuple(clip.parameters()) for name, clip in clips.items()}
        inputs: list[ActivationClip] = []
        if self.activation_clip and is_learnable(self.activation):
            inputs = [ActivationClip(self.activation) for _ in block.groups]
        names = [input_name(block.task.arch, block.index, group) for group in block.groups]
        for name, each in zip(names, inputs, strict=False):
            each.to(block.task.device)
            named[f"{name}: ends"] = tuple(each.parameters())
        rates = [self.rate if not name.endswith(": ends") else self.clip_rate for name in named]
        groups = [
            {"params": list(parameters), "lr": rate}
            for parameters, rate in zip(named.values(), rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        steps = self.epochs * len(block.inputs)

        def decay(step: int) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * max(0.5 * (1 + math.cos(math.pi * step / steps)), 1e-3)

        with ExitStack() as stack:
            for piece in pieces:
                stack.enter_context(piece.live())
            stack.enter_context(quantized(block, rules, self.activation, inputs))
            stack.enter_context(rounded_cache(block.task, [block.index], self.kv))
            before = reconstruction.total()
            reconstruction.fit(optimizer, named, steps, generator, decay)
            after = reconstruction.total()
        log.info("%s: error %.4g, to begin with %.4g", block.name, after, before)
        for piece in pieces:
            piece.fold()
        block.task.shares |= {name: each.shares for name, each in zip(names, inputs, strict=False)}
        for name, clip in clips.items():
            weight = block.linears[name].weight
            assign(weight, clip.clamp(weight.data))
