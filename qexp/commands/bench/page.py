"""Benchmark of the report page: seconds until a browser has drawn it, and its size."""

import json
import random
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig, OmegaConf

from qexp.commands import report as command
from qexp.commands.bench.chromium import chromium, find
from qexp.commands.bench.sharing import job
from qexp.commands.bench.timing import timed
from qexp.common.cache_entries import default_folder
from qexp.common.errors import UserError
from qexp.runs import results

RUNS = 500
METHODS = ("rtn", "gptq", "spqr")
KEYS = {"weight.bits": (2, 3, 4, 5, 6, 8), "weight.group_size": (16, 32, 64, 128)}
ROWS = ",".join(["method", *KEYS, "calibration.sequences"])
REPEATS = 5
# what else runs on the machine lengthens the load, but not the time on a processor
TIMES = {"on a processor": "ThreadTime", "script": "ScriptDuration", "layout": "LayoutDuration"}
TIMES |= {"style": "RecalcStyleDuration"}
ACTIONS = {
    "sort": "document.querySelector('th.number .sort').click()",
    "filter": "const query = document.getElementById('query'); query.value = 'gptq';"
    "query.dispatchEvent(new Event('input'))",
}


def page(cfg: DictConfig, overrides: list[str]) -> None:
    """The report of RUNS settings. One run of each method is real; the others are its copies with
    other values of KEYS, another number of calibration sequences and shifted metrics.

    Raises UserError without a browser.
    """
    browser = find()
    if browser is None:
        raise UserError("bench page: no Chromium is on the PATH; CHROME_BIN may name one")
    with TemporaryDirectory() as name:
        made, out = Path(name) / "runs", Path(name) / "report"
        models = default_folder()
        for method in METHODS:
            job([*overrides, f"method={method}", "logger=none"], Path(name) / method, models)
        real = [path.parent for path in sorted(Path(name).glob(f"*/outputs/*/{results.METRICS}"))]
        for at in range(RUNS):
            copy(real[at % len(real)], made / f"{at:04}", at // len(real))
        seconds = timed(lambda: command.main([str(made), "--out", str(out), "--rows", ROWS]))
        file = out / command.FILES[0]
        print(f"\n{RUNS} runs, written in {seconds:.1f} s, {file.stat().st_size / 1e6:.2f} MB")
        measure(browser, file)


def measure(browser: str, file: Path) -> None:
    """Prints the median of REPEATS loads, each in a new browser, and the times of two actions."""
    loads = sorted((_load(browser, file) for _ in range(REPEATS)), key=lambda load: load["load"])
    median = loads[len(loads) // 2]
    print(f"load {median['load']:.2f} s, the median of {REPEATS} from {loads[0]['load']:.2f} s")
    for name, counter in TIMES.items():
        print(f"  {name:<16}{median[counter]:6.2f} s")
    print(f"{median['Nodes']:.0f} nodes, {median['elements']:.0f} elements")
    print(f"sort {median['sort']:.0f} ms, filter {median['filter']:.0f} ms")


def _load(browser: str, file: Path) -> dict[str, float]:
    with chromium(browser) as page:
        found = {"load": page.show(file), **page.metrics()}
        for name, act in ACTIONS.items():
            timed = f"const t = performance.now(); {act}; document.body.offsetHeight;"
            found[name] = page.evaluate(f"(() => {{ {timed} return performance.now() - t }})()")
        return found | {"elements": page.evaluate("document.querySelectorAll('*').length")}


def copy(run: Path, to: Path, at: int) -> None:
    """The folder of a run with the values of KEYS number `at`, and metrics that differ by them."""
    (to / ".hydra").mkdir(parents=True)
    for file in ("hydra.yaml", "config.yaml", "overrides.yaml"):
        shutil.copy(run / ".hydra" / file, to / ".hydra" / file)
    for name in (results.PROVENANCE, results.LAYERS):
        shutil.copy(run / name, to / name)
    words = list(OmegaConf.load(run / ".hydra" / "overrides.yaml"))
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    for key, values in KEYS.items():
        at, place = divmod(at, len(values))
        words.append(f"{key}={values[place]}")
        OmegaConf.update(config, key, values[place])
    words.append(f"calibration.sequences={8 * (at + 1)}")
    OmegaConf.update(config, "calibration.sequences", 8 * (at + 1))
    OmegaConf.save(config, to / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.create(words), to / ".hydra" / "overrides.yaml")
    metrics = json.loads((run / results.METRICS).read_text())
    stored = int(config.weight.bits) + 32 / int(config.weight.group_size)
    chance = random.Random(" ".join(words))
    for name in metrics:
        if re.search(r"/ppl$", name):
            metrics[name] *= 1 + chance.uniform(0.9, 1.1) * 4 ** (3 - stored)
    metrics["weight/bits"] = stored
    (to / results.METRICS).write_text(json.dumps(metrics))
