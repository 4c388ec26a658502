"""One run, from a configuration to the files of its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from qexp.common import collectives, launch, numerics, progress, ranks, trainers
from qexp.common.errors import UserError
from qexp.common.workspace import Workspace
from qexp.config import grid_choice, root_keys
from qexp.config.instantiate import instantiate
from qexp.data.recipe import Recipe
from qexp.eval.base import Evaluator, FloatModel
from qexp.eval.stage import evaluate
from qexp.models import footprint
from qexp.models.base import ModelSource
from qexp.models.device import as_task, device_of
from qexp.models.state_diff import Checksums, added, checksums, state_diff
from qexp.packed import weights_file
from qexp.quantizers import maps
from qexp.quantizers.scheme import FloatActivations
from qexp.runs import recorded, repeatable, results, used_modules
from qexp.runs.provenance import Provenance
from qexp.runs.results import Answer
from qexp.step import Nothing, Record, Step, storage
from qexp.task import Batch, Task


@dataclass(frozen=True)
class Parts:
    """The objects that a configuration names."""

    source: ModelSource
    recipe: Recipe
    steps: list[Step]  # the transform, then the method
    evaluators: list[Evaluator]

    def files(self) -> list[Path]:
        """Every local file that the run reads."""
        found = [*self.source.files(), *self.recipe.files()]
        for step in self.steps:
            found += [path for recipe in step.recipes().values() for path in recipe.files()]
        return found + [path for evaluator in self.evaluators for path in evaluator.files()]


def answer(cfg: DictConfig, folder: Path) -> Answer | None:
    """The result of a finished run of this configuration in its folder, else in a record, or None
    (reason logged) if it must run. Raises UserError like `build`."""
    stands = (folder / results.METRICS).exists()
    if not stands and not recorded.paths(cfg):
        return None
    files = build(cfg).files()
    needs = [weights_file.FILE] if cfg.save_weights else []
    if stands and (metrics := results.read(folder, files, needs)) is not None:
        repeatable.report(cfg, folder)
        return Answer(metrics, folder, results.cost(folder))
    return recorded.answer(cfg, files)


def run(cfg: DictConfig, folder: Path, loggers: Sequence[Logger] = ()) -> dict[str, float]:
    """Build, load, apply, evaluate, write; the metrics, which `loggers` get as they are known.

    With `trainer.devices` processes the first one alone logs and writes. Raises UserError for what
    the user can put right; nothing is written then.
    """
    parts = build(cfg)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    progress.show(cfg.progress and not ranks.rank())
    numerics.of(cfg).apply()  # before cuBLAS begins
    devices = instantiate(cfg.trainer).devices
    if devices == ranks.world() == 1:
        return _run(parts, cfg, folder, loggers)
    device = device_of(cfg.device)
    trainers.check(device, devices)
    with launch.processes(folder, devices):
        trainers.connect(device, devices)
        return _run(parts, cfg, folder, loggers)


def _run(
    parts: Parts, cfg: DictConfig, folder: Path, loggers: Sequence[Logger]
) -> dict[str, float]:
    provenance = Provenance(used_modules.roots(cfg))
    provenance.read_files(parts.files())
    L.seed_everything(cfg.seed, verbose=False)
    footprint.check(cfg)
    with provenance.stage("load"):
        task = load(parts, cfg, folder)
        task.workspace.loggers = loggers
        origin = checksums(task.model) if cfg.save_weights else {}
        names = {name for name, _ in task.model.named_parameters()}
    source = parts.source
    provenance.add(model=source.fingerprint(), tensor_types=source.tensor_types())
    provenance.add(device=str(task.device), processes=ranks.world(), seed=cfg.seed)
    provenance.add(numerics=numerics.facts(task.device))
    evaluators = measure_float(parts, task, cfg, folder, provenance)
    records = apply(parts, task, provenance)
    metrics = storage(records, added(task.model, names), maps.bits(task))
    for logger in loggers:
        logger.log_metrics(metrics)
    metrics |= evaluate(evaluators, task, provenance)
    if ranks.rank():
        return metrics
    if cfg.save_weights:
        save(task, origin, records, folder)
    written = results.write(folder, metrics, records, provenance)
    task.workspace.clear()
    return written


def build(cfg: DictConfig) -> Parts:
    """Instantiate what the configuration names. UserError for settings that cannot work: whatever
    needs no model to be seen is seen here."""
    root_keys.check(cfg)
    grid_choice.check(cfg)
    return Parts(
        instantiate(cfg.model),
        instantiate(cfg.calibration),
        [instantiate(cfg.transform), instantiate(cfg.method)],
        [_evaluator(str(name), node) for name, node in cfg.eval.items()],
    )


def load(parts: Parts, cfg: DictConfig, folder: Path) -> Task:
    """The model on its device, checked against what is going to be done to it."""
    loaded = parts.source.loaded()
    task = as_task(parts.source, loaded, cfg)
    memory = cfg.get("memory")  # older runs have no such key
    task.workspace = Workspace(folder, None if memory is None else float(memory))
    loaded.finish(task)
    unquantized = parts.source.origin()
    task.original = lambda: as_task(unquantized, unquantized.loaded(), cfg).model
    _check_quantizers(task, parts.steps)
    for evaluator in parts.evaluators:
        evaluator.check(task)
    return task


def measure_float(
    parts: Parts, task: Task, cfg: DictConfig, folder: Path, provenance: Provenance
) -> list[Evaluator]:
    """The evaluators, of which those that compare with the float model have measured it."""
    unquantized = parts.source.origin()

    @cache
    def float_task() -> Task:
        if unquantized is parts.source:
            return task
        return as_task(unquantized, unquantized.loaded(), cfg)

    identity = unquantized.fingerprint() | numerics.identity(task.device)
    start = FloatModel(identity, float_task, folder)
    with provenance.stage("measure the float model"), isolate_rng():
        return [evaluator.measure_float(start) for evaluator in parts.evaluators]


def apply(parts: Parts, task: Task, provenance: Provenance) -> list[Record]:
    """Transform and quantize; a record of each quantized linear."""

    def batches() -> list[Batch]:
        found = parts.recipe(task)  # first: it may refuse, before the whole text is read
        provenance.add(calibration=parts.recipe.definition() | parts.recipe.followed(task))
        return found

    for step in parts.steps:
        own = {k: x.definition() | x.followed(task) for k, x in step.recipes().items()}
        provenance.add(training=own)
    records: list[Record] = []
    with provenance.stage("quantize"):
        for step in parts.steps:
            records += step(task, batches)
            collectives.synchronize(task)  # what each process computed may differ in the last bits
    return records


def _check_quantizers(task: Task, steps: list[Step]) -> None:
    """UserError where a loaded model has activation quantizers, of settled ranges, and a step would
    change what they round or add others."""
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


def _evaluator(name: str, node: Any) -> Evaluator:
    """UserError where only fields of an evaluation are given, and nothing says which one it is."""
    if not isinstance(node, DictConfig):
        raise UserError(f"eval.{name}={node}: give a choice, eval={name}, or single fields")
    if "_target_" not in node:
        raise UserError(
            f"eval.{name} has fields and is not chosen: name it in eval=[…], or leave it out with "
            f"~eval.{name}"
        )
    evaluator: Evaluator = instantiate(node)
    return evaluator


def save(task: Task, origin: Checksums, records: list[Record], folder: Path) -> None:
    """Codes and scales of the weights, whatever else in the model is not as it was loaded, online
    maps, and the ranges of static activation quantizers."""
    packed = {record.name: record.packed for record in records}
    others = {
        f"model.{name}": tensor
        for name, tensor in state_diff(task.model, origin, packed.keys()).items()
    }
    others |= {f"quantizers.{name}": t for name, t in task.quantizers.state_dict().items()}
    others |= {f"maps.{name}": matrix for name, matrix in maps.stored(task).items()}
    weights_file.save(folder, packed, others, maps.layout(task))
