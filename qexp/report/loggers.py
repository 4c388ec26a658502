"""Loggers: a run's metrics as a CSV file or in Weights & Biases, as loggers of Lightning."""

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger as LightningLogger
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from qexp.common.files import atomic
from qexp.config.instantiate import instantiate
from qexp.runs import finished, results


class Logger(ABC):
    """One destination for the metrics of a job."""

    @abstractmethod
    def open(
        self, config: dict[str, Any], folder: Path, group: str | None
    ) -> AbstractContextManager[LightningLogger]:
        """Open it for one job. Metrics of training have a step, the results of the run have none.

        `config` is flat and resolved, with the choices of config groups under `choices.`. `group`
        is the name of the sweep that the job belongs to.
        """


class CsvLogger(LightningLogger):
    """Keeps the results of a run; lines of training are in training.csv already."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            self.metrics.update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own."""


@dataclass(frozen=True)
class Csv(Logger):
    """`metrics.csv` in the run's folder, one line per metric, for spreadsheets and `grep`."""

    @contextmanager
    def open(
        self, config: dict[str, Any], folder: Path, group: str | None
    ) -> Iterator[LightningLogger]:
        """The file is written at the end, so a failed job writes none."""
        yield (logger := CsvLogger())
        if logger.metrics:
            with atomic(folder / "metrics.csv") as path, path.open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["metric", "value"])
                table.writerows(logger.metrics.items())


@dataclass(frozen=True)
class Wandb(Logger):
    """One Weights & Biases run per job, grouped by its sweep.

    The W&B run is finished inside the job; otherwise it would receive the metrics of the next job
    in the same process. If WANDB_MODE is not set it runs offline: no account and no login, only
    files in the run's folder, which `wandb sync` uploads. W&B samples the machine's load itself.
    """

    project: str = "qexp"
    entity: str | None = None
    tags: Sequence[str] = ()

    @contextmanager
    def open(
        self, config: dict[str, Any], folder: Path, group: str | None
    ) -> Iterator[LightningLogger]:
        """The W&B run has the folder's name; it is marked as failed when the job fails."""
        # otherwise wandb sends its own errors to a server
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            tags=list(self.tags),
            name=folder.name,
            group=group,
            job_type=config.get("choices.method"),
            config=config,
            dir=str(folder),
            mode=None if os.environ.get("WANDB_MODE") else "offline",
            reinit="finish_previous",
        )
        code = 1
        try:
            yield WandbLogger(experiment=run)
            run.log(_shown(folder))
            for text in folder.glob("*.md"):  # texts written by evaluators
                run.save(str(text), base_path=str(folder), policy="now")
            code = 0
        finally:
            run.finish(exit_code=code)


@contextmanager
def opened(
    cfg: DictConfig, folder: Path, group: str | None = None
) -> Iterator[list[LightningLogger]]:
    """All loggers of a configuration; they are closed in reverse order."""
    resolved: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    chosen = results.choices(folder) if (folder / ".hydra").is_dir() else {}
    config = finished.flat(resolved) | {f"choices.{k}": v for k, v in chosen.items()}
    nodes = cfg.get("logger") or {}
    with ExitStack() as stack:
        yield [
            stack.enter_context(instantiate(node).open(config, folder, group))
            for node in nodes.values()
        ]


def _lines(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; empty if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _shown(folder: Path) -> dict[str, Any]:
    """The layer errors as a table and a heat map, the run's PNG files, and its costs by stage."""
    import wandb

    from qexp.report import heatmap

    shown: dict[str, Any] = {}
    if layers := _lines(folder / results.LAYERS):
        names: list[Any] = list(layers[0])
        rows = [[_number(line[name]) for name in names] for line in layers]
        shown["layers"] = wandb.Table(columns=names, data=rows)
        errors = {line["name"]: float(line["error"]) for line in layers}
        limits = heatmap.span(errors.values())
        head = f"<style>{heatmap.STYLE}</style>{heatmap.scale(limits)}"
        page = f"{head}<p>{heatmap.heat_map(errors, limits)}"
        shown["figures/layers"] = wandb.Html(page)
    for path in sorted(folder.glob("*.png")):
        shown[f"figures/{path.stem}"] = wandb.Image(str(path))
    for stage, cost in results.provenance(folder).get("stages", {}).items():
        shown |= {f"cost/{stage}/{key}": value for key, value in cost.items()}
    return shown


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
