"""Provenance of a run: code, machine, package versions, input files and cost of each stage."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from qexp.common import hashes, heap
from qexp.common.modules import PIPELINE, facts

VERSIONS = (
    "qexp",
    "torch",
    "transformers",
    "tokenizers",
    "lightning",
    "hydra-core",
    "datasets",
    "gguf",
    "numpy",
    "safetensors",
)


class Provenance:
    """The record of one run, filled while it runs and written next to its metrics."""

    def __init__(self, roots: Sequence[str] = (PIPELINE,)) -> None:
        """`roots`: the classes and modules that the run uses, see `used_modules.roots`."""
        self._modules = facts(roots)
        self._started = datetime.now(UTC)
        self._facts: dict[str, Any] = {}
        self._stages: dict[str, dict[str, float]] = {}
        self._inputs: dict[str, dict[str, int] | None] = {}

    def add(self, **facts: Any) -> None:
        """Record facts that only the run knows: device, fingerprints of model and data, protocols …

        A dict is merged into the dict recorded under the same name.
        """
        for name, value in facts.items():
            known = self._facts.get(name)
            if isinstance(known, dict) and isinstance(value, dict):
                value = {**known, **value}
            self._facts[name] = value

    def read_files(self, paths: Iterable[Path]) -> None:
        """Record local input files; when one changes, the stored result is stale."""
        for path in paths:
            self._inputs[str(path)] = stamp(path)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage: wall time in seconds, peak resident and peak CUDA memory in bytes.

        A stage entered again adds its seconds and keeps the higher peak. Stages must not be nested:
        the operating system keeps one peak per process.
        """
        cuda = _cuda()
        heap.trim()  # what an earlier stage gave up is not of this one
        reset_peak()
        if cuda is not None:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield
        finally:
            cuda = _cuda()  # the stage may have been the first to use it
            if cuda is not None:
                cuda.synchronize()
            stage = self._stages.setdefault(name, {"seconds": 0.0, "peak_rss_bytes": 0})
            stage["seconds"] += time.perf_counter() - start
            stage["peak_rss_bytes"] = max(stage["peak_rss_bytes"], peak_rss())
            if cuda is not None:
                peak = cuda.max_memory_allocated()
                stage["peak_cuda_bytes"] = max(stage.get("peak_cuda_bytes", 0), peak)

    def dict(self) -> Mapping[str, Any]:
        """The whole record, ready for JSON."""
        torch = sys.modules.get("torch")
        revision, dirty = _git()
        return {
            "code": hashes.code(),
            "modules": self._modules,
            "git": {"revision": revision, "dirty": dirty},
            "command": sys.argv,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "versions": _versions(),
            "machine": {
                "host": platform.node(),
                "system": platform.platform(),
                "processor": processor(),
                "cores": os.cpu_count(),
                "cuda": [_cuda_name(cuda)] if (cuda := _cuda()) is not None else [],
            },
            "threads": torch.get_num_threads() if torch is not None else None,
            **self._facts,
            "inputs": self._inputs,
            "stages": self._stages,
        }


def stamp(path: Path) -> dict[str, int] | None:
    """Size in bytes and modification time in nanoseconds; None for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def peak_rss() -> int:
    """Peak resident bytes of this process since the last reset (not on Linux: since its start)."""
    try:
        status = Path("/proc/self/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere


def reset_peak() -> None:
    """Reset the peak to the memory that is resident now, where the kernel permits it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not permitted: the peak then includes the earlier stages


def _cuda() -> Any:
    """`torch.cuda` if it is in use; this check neither imports torch nor initializes a device."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _cuda_name(cuda: Any) -> str:
    return str(cuda.get_device_name())


def _versions() -> dict[str, str]:
    installed = {}
    for name in VERSIONS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # run from a source folder, or an optional package
    return installed


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git() -> tuple[str | None, bool | None]:
    """Revision of the checkout that the package runs from, and whether files differ from it."""
    folder = hashes.PACKAGE.parent
    if not (folder / ".git").exists():  # a wheel inside someone else's repository has none
        return None, None
    git = ("git", "-C", str(folder))
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return revision.stdout.strip(), bool(changes.stdout.strip())
