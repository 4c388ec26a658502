"""Equal metrics in two checkouts: `python scripts/compare_checkouts.py OLD NEW [SWEEP …]`.

Runs the same jobs on a tiny model in both checkouts, with the Python of this process and separate
caches, and compares every metric to the last digit. Exits with 1 when one differs: for changes that
must not change a number.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ["model=tiny_llama", "data=synthetic", "progress=false", "logger=none"]
SHORT = ["trainer.steps=40", "trainer.every=20"]
SWEEPS = {
    "solve": ["method=none,rtn,gptq,spqr,billm,pbllm,quip,oac,oac_binary"],
    "train": [
        "method=qat,lsq,contapprox,dsq,ewgs,pact,llm_qat,peqa,efficient_qat,quanttune,quadapter",
        *SHORT,
    ],
    "transform": [
        "transform=smooth,awq,equalize,os_plus,rotate,omniquant",
        "method=gptq",
        "activation=int8_tensor",
    ],
    "learned": ["transform=quadapter", "transform.steps=40", "activation=none,int8_tensor"],
}


def metrics(checkout: Path, sweep: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Metrics by the job's overrides; a job that failed has none."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "QEXP_CACHE_DIR": str(folder / "c")}
    command = [sys.executable, "-m", "qexp", "-m", *COMMON, *sweep, f"hydra.sweep.dir={folder}"]
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
    found = {}
    for path in folder.glob("*/.hydra/overrides.yaml"):
        result = path.parents[1] / "metrics.json"
        found[path.read_text()] = json.loads(result.read_text()) if result.exists() else {}
    return found


def main() -> int:
    old, new = (Path(name).resolve() for name in sys.argv[1:3])
    different = 0
    for name in sys.argv[3:] or SWEEPS:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            before = metrics(old, SWEEPS[name], Path(first))
            after = metrics(new, SWEEPS[name], Path(second))
        wrong = [
            " ".join(job.replace("- ", "").split())
            for job in sorted(before.keys() | after.keys())
            if not before.get(job) or before.get(job) != after.get(job)
        ]
        print(f"{name}: {len(before)} jobs, {len(wrong)} with other metrics")
        print("".join(f"  {job}\n" for job in wrong), end="")
        different += len(wrong)
    return int(bool(different))


raise SystemExit(main())
