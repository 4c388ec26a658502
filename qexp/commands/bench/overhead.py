"""What a job costs beside its stages: to compose, instantiate, lock, log and write."""

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
        print(f"{'a job beside them':<28}{(seconds - stages) / len(made):8.2f} s")
        # on a machine that others use the clock runs on while a job waits for them
        print(f"{'processor, stages too':<28}{busy / len(made):8.2f} s")


def sweep(words: list[str]) -> None:
    """The command with these words, in this process."""
    sys.argv = ["qexp", "-m", *words]
    with suppress(SystemExit):
        app.main()
