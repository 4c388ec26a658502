"""Benchmark of memory: the peak of every stage of a run and of its export, in processes of their
own."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.runs import results

MIB = 2**20
# All that a run imports, before it has a model.
IMPORTS = "import lightning, torch, transformers, qexp.pipeline, qexp.models.local"
PEAK = "from qexp.runs.provenance import peak_rss; print(peak_rss())"
EXPORT = (
    "import sys; from qexp.cli import command; "
    "command('export', [*sys.argv[1:3], 'format=float', 'verify=file']); " + PEAK
)


def memory(cfg: DictConfig, overrides: list[str]) -> None:
    """Peak resident MiB of each stage, beyond the interpreter and the libraries that it imports,
    and of an export of the run in float."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        base = int(_python("-c", f"{IMPORTS}; {PEAK}"))
        print(f"{'interpreter and libraries':<32}{base / MIB:8.0f} MiB", flush=True)
        _python("-m", "qexp", *overrides, f"hydra.run.dir={run}", "progress=false")
        stages = results.provenance(run)["stages"]
        for name, stage in stages.items():
            peak = (stage["peak_rss_bytes"] - base) / MIB
            print(f"{name:<32}{peak:8.0f} MiB{stage['seconds']:9.1f} s", flush=True)
        if cfg.save_weights:
            peak = int(_python("-c", EXPORT, str(run), f"{folder}/export").split()[-1])
            print(f"{'export format=float':<32}{(peak - base) / MIB:8.0f} MiB")


def _python(*words: str) -> str:
    """What a Python process prints. UserError with its last line where it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        said: Sequence[str] = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"bench memory: {said[-1]}")
    return done.stdout
