"""Float models that a run trained: `qexp model=smollm2_float`."""

from dataclasses import dataclass
from pathlib import Path

from qexp.common.errors import UserError
from qexp.grid.scale import DTYPES
from qexp.models.base import Loaded, ModelSource, check
from qexp.models.from_run import FromRun
from qexp.packed import weights_file
from qexp.runs import results


@dataclass(frozen=True)
class Trained(ModelSource):
    """The weights that a run in `folder` trained and left in float: a model to start from.

    In contrast to `FromRun` it is what quantized models are compared with, so `origin` is this
    model and nothing is counted as stored on a grid. `folder` is that of the run, or the one above
    it if it holds a single finished run. made_by: the command that makes it.
    """

    folder: str
    made_by: str
    dtype: str = "float32"
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self)

    def loaded(self) -> Loaded:
        run = self._run()
        packed, _ = weights_file.load(Path(run.folder))
        if packed:
            raise UserError(
                f"model.folder: {run.folder} holds quantized weights; load it by model=from_run "
                f"run={run.folder}"
            )
        loaded = run.loaded()
        loaded.model.to(DTYPES[self.dtype])
        return loaded

    def fingerprint(self) -> dict[str, str]:
        return self._run().fingerprint() | {"dtype": self.dtype}

    def files(self) -> list[Path]:
        return self._run().files()

    def _run(self) -> FromRun:
        """UserError where there is no finished run with weights, or more than one."""
        top = Path(self.folder)
        below = (*top.glob(results.METRICS), *top.glob(f"*/{results.METRICS}"))
        finished = sorted(path.parent for path in below)
        if not finished:
            raise UserError(
                f"model.folder: {self.folder} holds no finished run; make it by: {self.made_by}"
            )
        if len(finished) > 1:
            raise UserError(
                f"model.folder: {self.folder} holds {len(finished)} finished runs; give the folder "
                f"of one, model.folder={finished[0]}"
            )
        if not (finished[0] / weights_file.FILE).is_file():
            raise UserError(
                f"model.folder: {finished[0]} has no {weights_file.FILE}; make it by: "
                f"{self.made_by} save_weights=true"
            )
        return FromRun(str(finished[0]))
