"""One run, from a configuration to the files of its folder."""

import logging
from functools import cache
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from qexp.common import progress, ranks
from qexp.common.errors import UserError
from qexp.config import grid_choice
from qexp.config.instantiate import instantiate
from qexp.data.recipe import Recipe
from qexp.eval.base import Evaluator, FloatModel, digest
from qexp.models.base import ModelSource
from qexp.models.device import as_task
from qexp.models.state_diff import Checksums, checksums, state_diff
from qexp.packed import weights_file
from qexp.quantizers.scheme import FloatActivations
from qexp.runs import results
from qexp.runs.provenance import Provenance
from qexp.step import Nothing, Record, Step
from qexp.task import Batch, Task

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Load, transform, quantize, evaluate, write. A finished run is answered from its folder.

    Raises UserError for what the user can put right; nothing is written then. Raises ranks.Done in
    a process that is there to train with the first one, which alone evaluates and writes.
    """
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: give a whole number from 0 to 2**32 - 1.")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    progress.show(cfg.progress)
    grid_choice.check(cfg)
    source: ModelSource = instantiate(cfg.model)
    recipe: Recipe = instantiate(cfg.calibration)
    steps: list[Step] = [instantiate(cfg.transform), instantiate(cfg.method)]
    evaluators = [_evaluator(str(name), node) for name, node in cfg.eval.items()]
    files = [*source.files(), *recipe.files()]
    files += [p for step in steps for each in step.recipes().values() for p in each.files()]
    files += [path for evaluator in evaluators for path in evaluator.files()]
    needs = [weights_file.FILE] if cfg.save_weights else []
    if (done := results.read(folder, files, needs)) is not None:
        return done

    provenance = Provenance()
    provenance.read_files(files)
    L.seed_everything(cfg.seed, verbose=False)
    with provenance.stage("load"):
        loaded = source.load()
        task = as_task(source, loaded, cfg)
        task.folder = folder
        loaded.finish(task)
        _check_quantizers(task, steps)
        for evaluator in evaluators:
            evaluator.check(task)
        origin = checksums(task.model) if cfg.save_weights else {}
    provenance.add(model=source.fingerprint(), device=str(task.device), seed=cfg.seed)

    unquantized = source.origin()

    @cache
    def float_task() -> Task:
        same = unquantized is source
        return task if same else as_task(unquantized, unquantized.load(), cfg)

    start = FloatModel(unquantized.fingerprint() | {"device": task.device.type}, float_task, folder)
    if not ranks.rank():
        with provenance.stage("measure the float model"), isolate_rng():
            evaluators = [evaluator.measure_float(start) for evaluator in evaluators]

    def batches() -> list[Batch]:
        provenance.add(calibration=recipe.definition())
        return recipe(task)

    for step in steps:
        provenance.add(training={k: each.definition() for k, each in step.recipes().items()})
    with provenance.stage("quantize"):
        records = [record for step in steps for record in step(task, batches)]
    if ranks.rank():
        raise ranks.Done
    metrics = storage(records)
    for evaluator in evaluators:
        with provenance.stage(f"evaluate {evaluator.name}"):
            numbers = evaluator(task)
        metrics |= {f"{evaluator.name}/{key}": value for key, value in numbers.items()}
        definition = evaluator.definition()
        entry = {"digest": digest(definition), "definition": definition}
        provenance.add(protocols={evaluator.name: entry})
    if cfg.save_weights:
        save(task, origin, records, folder)
    written = results.write(folder, metrics, records, provenance)
    task.written()
    return written


def _check_quantizers(task: Task, steps: list[Step]) -> None:
    """UserError where a loaded model has activation quantizers, of settled ranges, and a step would
    change what they round or put others beside them."""
    transform, method = steps
    kinds = getattr(method, "activations", ())
    if task.quantizers and not (
        isinstance(transform, Nothing) and all(isinstance(kind, FloatActivations) for kind in kinds)
    ):
        raise UserError(
            "model: it has activation quantizers already, which no transform or other quantizers "
            "can follow; start from the run's float model, or say transform=none activation=none "
            "kv=none"
        )


def _evaluator(name: str, node: DictConfig) -> Evaluator:
    """UserError where only fields of an evaluation are given, and nothing says which one it is."""
    if "_target_" not in node:
        raise UserError(
            f"eval.{name} has fields and is not chosen: name it in eval=[…], or leave it out with "
            f"~eval.{name}"
        )
    evaluator: Evaluator = instantiate(node)
    return evaluator


def storage(records: list[Record]) -> dict[str, float]:
    """Measured bits per quantized weight over all linears, and how many weights those are; beside
    them the bits that the method's paper would print, where it counts otherwise."""
    weights = sum(record.rows * record.columns for record in records)
    if not weights:
        return {}
    bits = sum(record.bits * record.rows * record.columns for record in records)
    error = sum(record.error for record in records) / len(records)
    metrics = {"weight/bits": bits / weights, "weight/count": float(weights), "weight/error": error}
    printed = [(r.paper_bits, r.rows * r.columns) for r in records if r.paper_bits is not None]
    if printed:
        total = sum(bits * count for bits, count in printed)
        metrics["weight/paper_bits"] = total / sum(count for _, count in printed)
    return metrics


def save(task: Task, origin: Checksums, records: list[Record], folder: Path) -> None:
    """Codes and scales of the weights, whatever else in the model is not as it was loaded, and the
    ranges of static activation quantizers."""
    packed = {record.name: record.packed for record in records}
    others = {
        f"model.{name}": tensor
        for name, tensor in state_diff(task.model, origin, packed.keys()).items()
    }
    others |= {f"quantizers.{name}": t for name, t in task.quantizers.state_dict().items()}
    weights_file.save(folder, packed, others)
