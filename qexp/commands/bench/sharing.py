"""Benchmark of the cache in a sweep: each job with the shared cache and with an empty one."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from qexp.common.cache_entries import default_folder
from qexp.config.instantiate import instantiate
from qexp.sweeps import app

HESSIANS = {"gptq": "activation", "spqr": "activation", "oac_one_pass": "output"}
INPUTS = ("models", "converted")  # the model is on disk in either case


def sharing(cfg: DictConfig, overrides: list[str]) -> None:
    """Processor seconds of whole jobs. The first on each Hessian finds none of it in either cache
    and is run once."""
    instantiate(cfg.model).loaded()  # imported, fetched and converted before the clock runs
    models = default_folder()
    before, after = 0.0, 0.0
    seen: set[str] = set()
    print(f"{'job':<28}{'without cache':>16}{'with cache':>16}")
    with TemporaryDirectory() as folder:
        for method, hessian in HESSIANS.items():
            for bits in (2, 3, 4):
                own = [
                    *overrides,
                    f"method={method}",
                    "method.propagate=false",
                    f"weight.bits={bits}",
                ]
                shared = job(own, Path(folder) / "shared", models)
                alone = shared
                if hessian in seen:
                    alone = job(own, Path(folder) / f"{method}-{bits}", models)
                seen.add(hessian)
                before, after = before + alone, after + shared
                print(f"{method:<20}{bits} bits{alone:15.1f} s{shared:14.1f} s", flush=True)
    print(f"{'all':<26}{before:15.1f} s{after:14.1f} s {after / before:8.2f} x without")


def job(words: Sequence[str], place: Path, models: Path) -> float:
    """Processor seconds of `qexp` in this process, with a cache in `place`.

    A new cache contains only the model.
    """
    cache = place / "cache"
    if not cache.is_dir():
        cache.mkdir(parents=True)
        for kind in INPUTS:
            (models / kind).mkdir(parents=True, exist_ok=True)
            (cache / kind).symlink_to(models / kind)
    os.environ["QEXP_CACHE_DIR"] = str(cache)
    sys.argv = ["qexp", *words]
    with chdir(place), _handlers():
        start = time.process_time()
        try:
            app.main()
        except SystemExit as stop:
            if stop.code:
                raise
        return time.process_time() - start


@contextmanager
def _handlers() -> Iterator[None]:
    """Restores the log handlers: Hydra's handler writes to the job's folder."""
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in before:
                handler.close()
        root.handlers[:] = before
