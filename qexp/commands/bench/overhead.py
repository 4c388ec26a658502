"""Benchmark of a job's overhead outside its stages: composing, instantiating, locking, logging."""

import os
import sys
from contextlib import chdir, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

from omegaconf import DictConfig

from qexp.commands.bench.timing import timed
from qexp.runs import results
from qexp.sweeps import app


def overhead(cfg: DictConfig, overrides: list[str]) -> None:
    """Seconds of a sweep less those of its jobs' stages, per job; a job before it has imported
    what there is to import. The command itself is run, with the words of this one."""
    with TemporaryDirectory() as folder, chdir(folder):
        os.environ["QEXP_CACHE_DIR"] = str(Path(folder) / "cache")
        sweep([*overrides, "seed=0"])
        before = set(Path("outputs").glob("*/metrics.json"))
        busy = process_time()
        seconds = timed(lambda: sweep([*overrides, "seed=1,2,3,4"]))
        busy = process_time() - busy
        made = set(Path("outputs").glob("*/metrics.json")) - before
        stages = sum(results.cost(path.parent)["seconds"] for path in made)
        print(f"{'jobs':<28}{len(made):8d}")
        print(f"{'stages of a job':<28}{stages / len(made):8.2f} s")
        print(f"{'rest of a job':<28}{(seconds - stages) / len(made):8.2f} s")
        # processor time too: on a shared machine wall time includes waiting for other programs
        print(f"{'processor, stages too':<28}{busy / len(made):8.2f} s")


def sweep(words: list[str]) -> None:
    """Runs `qexp -m` with these arguments in this process."""
    sys.argv = ["qexp", "-m", *words]
    with suppress(SystemExit):
        app.main()
