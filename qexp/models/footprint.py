"""Memory that a run needs, by the shapes of its model, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from omegaconf import DictConfig
from transformers import AutoConfig

from qexp import task
from qexp.arch import arch_of
from qexp.common import on_disk
from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.grid.scale import DTYPES
from qexp.models.base import ModelSource
from qexp.models.pretrained import skeleton
from qexp.walk import memory

GIB = 2**30
SQUARES = 5  # float32 matrices [columns, columns] that are in memory while a Hessian is factored
MATRICES = 8  # float32 matrices [rows, columns] while a matrix is solved


@dataclass(frozen=True)
class Footprint:
    """Bytes of host memory beyond the interpreter and its libraries.

    load: `whole` or `stream`. weights: that are in memory at one time, and the codes of finished
    linears. solving: the Hessian of a matrix and copies of both, of the largest. activations: of
    calibration, between blocks and inside one. logits: of one chunk of positions.
    """

    load: str
    weights: int
    solving: int
    activations: int
    logits: int

    @property
    def peak(self) -> int:
        """Of the stage that needs most: solving, or evaluation."""
        return self.weights + max(self.solving + self.activations, self.logits)

    def __str__(self) -> str:
        return f"about {self.peak / GIB:.2g} GiB of memory"


def solving(shapes: Sequence[tuple[int, int]], squares: int = SQUARES) -> int:
    """Numbers that are in memory while matrices of these rows and columns are solved, in turn.
    squares: 1, the identity, where there is no Hessian."""
    return max(squares * columns**2 + MATRICES * rows * columns for rows, columns in shapes)


def of(cfg: DictConfig) -> Footprint | None:
    """The footprint of a run; None for a model whose shapes are not known without loading it."""
    source = instantiate(cfg.model)
    assert isinstance(source, ModelSource)
    if (folder := source.config_folder()) is None:
        return None
    try:
        model = skeleton(AutoConfig.from_pretrained(str(folder), local_files_only=True), source)
    except (OSError, ValueError, RuntimeError):  # loading says what is wrong with it
        return None
    each, config = DTYPES[source.settled_dtype()].itemsize, model.config
    arch = arch_of(model)
    first = model.get_submodule(arch.blocks).get_submodule("0")
    groups = [[first.get_submodule(n).weight.shape for n in g.linears] for g in arch.groups]
    walks = "hessian" in cfg.method  # block by block, with calibration data
    # Linears that share a Hessian are one matrix.
    stacked = [(sum(rows for rows, _ in each), each[0][1]) for each in groups]
    alone = [(rows, columns) for each in groups for rows, columns in each]
    load = str(cfg.model.get("load", "whole"))
    weights = each * model.num_parameters()
    if load == "whole":
        codes = (cfg.get("weight") or {}).get("bits") or 0 if "solver" in cfg.method else 0
        blocks = len(model.get_submodule(arch.blocks))
        weights += int(codes * blocks * sum(rows * columns for rows, columns in alone) / 8)
    else:
        block = each * sum(parameter.numel() for parameter in first.parameters())
        weights = min(weights, on_disk.RESIDENT + block)
    sequences = (cfg.calibration.get("sequences") or 0) if walks else 0
    length = cfg.calibration.get("length", 1)
    widths = max(rows for rows, _ in alone), config.hidden_size
    tokens, chunk = sequences * length, cfg.method.get("chunk")
    at_once = min(chunk or memory.sequences(length, *widths, each), sequences)
    between = 2 * each * tokens * config.hidden_size
    waiting = each * memory.suspended(tokens, *widths)
    if cfg.get("memory") is not None and between > 2 * cfg.memory * GIB:
        between, waiting = on_disk.RESIDENT, 0
    if waiting > psutil.virtual_memory().available / 2:  # then a group of linears at a time
        waiting = 0
    within = waiting + each * memory.inside(at_once * length, *widths)
    vocabulary = getattr(config, "vocab_size", 0)
    return Footprint(
        load,
        weights,
        4 * (solving(stacked) if walks else solving(alone, squares=1)),
        between + within,
        8 * vocabulary * (task.positions(vocabulary, each) if vocabulary else 0),
    )


def check(cfg: DictConfig) -> None:
    """UserError, before anything is loaded, for a run that cannot fit into the free memory."""
    found, free = of(cfg), psutil.virtual_memory().available
    if found is None or found.peak <= free:
        return
    if found.load == "whole" and found.weights > free / 2:
        raise UserError(
            f"model.load=whole: the run needs {found}, {found.weights / GIB:.1f} GiB of it for "
            f"weights, and {free / GIB:.1f} GiB are free; say model.load=stream, which leaves "
            "weights on disk"
        )
    raise UserError(
        f"calibration.sequences: the run needs {found}, {found.activations / GIB:.1f} GiB of it "
        f"for activations and {found.solving / GIB:.1f} GiB for the largest linear, and "
        f"{free / GIB:.1f} GiB are free; give fewer sequences, or a small method.chunk"
    )
