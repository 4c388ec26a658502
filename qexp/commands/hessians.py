"""Hessians of a float model: traces by layer and by position, and solutions in every metric."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.files import write_rows
from qexp.config.instantiate import instantiate
from qexp.config.location import conf
from qexp.hessian import CacheableHessian
from qexp.hessian.position import KINDS, TraceByPosition
from qexp.models.base import ModelSource
from qexp.models.device import as_task
from qexp.packed import weights_file
from qexp.runs import resolvers, results
from qexp.solvers.base import error
from qexp.step import Nothing
from qexp.task import Task
from qexp.walk import Block, walk

FIELDS = "method.hessian."  # of the two Hessians from gradients
Row = dict[str, float | str]


def main(arguments: Sequence[str]) -> None:
    """`qexp hessians FOLDER [RUN …] [key=value …]`: FOLDER/layers.csv and FOLDER/positions.csv of
    the configured model and calibration data, with errors of finished runs' weights."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError("hessians: the first argument is the folder to write to")
    folder, rest = Path(arguments[0]), arguments[1:]
    words = [word for word in rest if "=" in word]
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        cfg = compose("config", [word for word in words if not word.startswith(FIELDS)])
        hessians = {kind: _hessian(kind, words) for kind in KINDS}
    source: ModelSource = instantiate(cfg.model)
    runs = {Path(run).name: _solution(run, source) for run in rest if "=" not in run}
    layers, positions = survey(source, cfg, hessians, runs)
    write_rows(folder / "layers.csv", layers)
    write_rows(folder / "positions.csv", positions)
    print(summary(layers, positions, list(runs)))


def _hessian(kind: str, words: Sequence[str]) -> CacheableHessian:
    own = [word for word in words if word.startswith(FIELDS)] if kind != KINDS[0] else []
    cfg = compose("config", ["method=gptq", f"method/hessian={kind}", *own])
    hessian: CacheableHessian = instantiate(cfg.method.hessian)
    return hessian


def _solution(run: str, source: ModelSource) -> dict[str, Tensor]:
    """The weights that a run stored. UserError where they are not of this model's own linears."""
    cfg = results.config(run)
    if instantiate(cfg.model).origin().fingerprint() != source.fingerprint():
        raise UserError(f"{run}: its model is another one than model of this command; give its own")
    if not isinstance(instantiate(cfg.transform), Nothing):
        raise UserError(f"{run}: its weights were transformed; give a run with transform=none")
    packed, _ = weights_file.load(Path(run))
    if not packed:
        raise UserError(f"{run}: it quantized no weights; give a run of a method that does")
    return {name: form.dequantize() for name, form in packed.items()}


def survey(
    source: ModelSource,
    cfg: DictConfig,
    hessians: Mapping[str, CacheableHessian],
    runs: Mapping[str, Mapping[str, Tensor]],
) -> tuple[list[Row], list[Row]]:
    """A row for each linear: of every Hessian the trace, the share of the first position in it, the
    effective number of tokens (Kish's (Σ c)² / Σ c² of the tokens' parts c of the trace), and the
    relative error of each run in its metric. And a row for each position: shares of the traces,
    means over linears. Everything at float weights."""
    task: Task = as_task(source, source.loaded(), cfg)
    first = next(iter(walk(task, instantiate(cfg.calibration)(task))))
    layers: dict[str, Row] = {name: {"name": name} for name in task.linears()}
    shares = []
    for name, (traces, squares) in _measured(_by_position(first), first).items():
        whole = traces.sum(1)
        shares.append(traces / whole[:, None])
        effective = whole.square() / squares.sum(1)
        for index, kind in enumerate(KINDS):
            layers[name] |= {
                f"trace_{kind}": float(whole[index]),
                f"first_{kind}": float(shares[-1][index, 0]),
                f"effective_{kind}": float(effective[index]),
            }
    for kind, hessian in hessians.items() if runs else ():
        for name, matrix in _measured(hessian, first).items():
            weight = task.model.get_submodule(name).weight.detach().float()
            for run, solution in runs.items():
                change = error(solution[name].to(weight) - weight, matrix)
                layers[name][f"error_{kind}_{run}"] = change / error(weight, matrix)
    means = torch.stack(shares).mean(0).T.tolist()
    positions = [{"position": i, **dict(zip(KINDS, x, strict=True))} for i, x in enumerate(means)]
    return list(layers.values()), positions


def _by_position(first: Block) -> TraceByPosition:
    return TraceByPosition(tokens=first.chunks[0].hidden.shape[1])


def _measured(hessian: CacheableHessian, first: Block) -> dict[str, Tensor]:
    """By the full names of linears."""
    root, blocks = first.task.arch.blocks, range(len(first.task.blocks))
    return {
        f"{root}.{index}.{name}": matrix
        for index, found in hessian.measure(first, blocks)
        for names, matrix in found.items()
        for name in names.split()
    }


def summary(layers: Sequence[Row], positions: Sequence[Row], runs: Sequence[str]) -> str:
    """A line for each Hessian: shares of positions in its trace, the effective number of tokens
    (geometric mean over linears), and mean errors of the runs. Then the trace of OAC's Hessian in
    units of the token-weighted one's, which lacks the products of different tokens' gradients. It
    is 1 where these gradients are uncorrelated, as those of labels sampled from the model are in
    expectation."""
    own = ("position 0", "1 to 3", "others", "effective tokens")
    columns = ("Hessian", *own, *(f"error of {run}" for run in runs))
    lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
    for kind in KINDS:
        share = [float(row[kind]) for row in positions]
        parts = [share[0], sum(share[1:4]), sum(share[4:])]
        means = [sum(float(row[f"error_{kind}_{run}"]) for row in layers) for run in runs]
        tokens = statistics.geometric_mean(float(row[f"effective_{kind}"]) for row in layers)
        cells = [f"{part:.1%}" for part in parts] + [f"{tokens:.0f}"]
        cells += [f"{x / len(layers):.3g}" for x in means]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    traces = [(float(row["trace_output"]), float(row["trace_token"])) for row in layers]
    ratio = statistics.geometric_mean([output / token for output, token in traces if token > 0])
    lines.append(f"trace of output / trace of token: {ratio:.2f} (geometric mean over linears)")
    return "\n".join(lines)
