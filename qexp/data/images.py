"""Corpora of labelled images: local files, or a data set of the hub."""

import gzip
import io
import logging
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.files import locate
from qexp.common.hashes import sha256
from qexp.data.corpus import Corpus, check_split, digest

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IDX = {"train": "train", "test": "t10k"}  # names of the splits in MNIST's files


Read = Callable[[], Image.Image]


class Row(NamedTuple):
    """A labelled image, read on demand."""

    read: Read
    label: int


@dataclass(frozen=True)
class Images(Corpus):
    """Files `split/class/image` in a folder or a tar archive, MNIST's idx files, or a hub data set.

    path: the folder or archive, also looked for below QEXP_DATA_DIR. Where it does not exist or is
    null, images come from `hub`. Classes are numbered in the order of their names.
    mean, std: normalization of channel values between 0 and 1, as in the model's training.
    crop: the central share of the shorter side that is resized to the model's image size.
    """

    name: str
    calibration_split: str
    evaluation_split: str
    path: str | None = None
    hub: str | None = None
    revision: str = "main"
    image: str = "image"  # columns of the hub data set
    label: str = "label"
    splits: tuple[str, ...] | list[str] = ("train", "test")
    mean: float | tuple[float, ...] | list[float] = 0.5
    std: float | tuple[float, ...] | list[float] = 0.5
    crop: float = 1.0

    def documents(self, split: str) -> list[str]:
        raise UserError(f"data={self.name}: holds images; choose a text, or an image model")

    def text(self, split: str) -> str:
        raise UserError(f"data={self.name}: holds images; choose a text, or an image model")

    def total(self, split: str) -> int:
        return len(self._rows(split))

    def images(
        self, split: str, shape: Sequence[int], classes: int, rows: Sequence[int]
    ) -> tuple[Float[Tensor, "images channels height width"], Int64[Tensor, " images"]]:
        available = self._rows(split)
        pixels = torch.empty(len(rows), *shape)
        for at, number in enumerate(rows):
            pixels[at] = self._pixels(available[number].read(), shape)
        return pixels, torch.tensor([available[number].label for number in rows])

    def files(self, split: str) -> list[Path]:
        path = self._path()
        if path is None or path.is_file():
            return [path] if path else []
        return _idx_files(path, split) or sorted(p for _, p in _tree(path, split))

    def fingerprint(self, split: str) -> str:
        content = [sha256(path) for path in self.files(split)] or [str(self.hub), self.revision]
        return digest([*content, f"{self.mean} {self.std} {self.crop}"])

    def _path(self) -> Path | None:
        """The folder or archive; None where images come from the hub."""
        path = locate(self.path) if self.path is not None else None
        if path is not None and path.exists():
            return path
        if self.hub is None:
            raise UserError(
                f"data.path: {self.path} does not exist, here or in the folder QEXP_DATA_DIR; "
                "give a folder or a tar archive"
            )
        return None

    def _rows(self, split: str) -> list[Row]:
        check_split(self, split, self.splits)
        path = self._path()
        if path is None:
            assert self.hub is not None
            place = f"$QEXP_DATA_DIR/{self.path}" if self.path else "data.path"
            return _hub_rows(self.hub, self.revision, split, self.image, self.label, place)
        if path.is_file():
            rows = _archive_rows(path, path.stat().st_mtime_ns, split)
        elif files := _idx_files(path, split):
            rows = _idx_rows(*files)
        else:
            rows = _by_class([(name, partial(_open, file)) for name, file in _tree(path, split)])
        if not rows:
            raise UserError(
                f"data.path: {path} has no images at {split}/CLASS/FILE ({', '.join(SUFFIXES)})"
            )
        return rows

    def _pixels(
        self, image: Image.Image, shape: Sequence[int]
    ) -> Float[Tensor, "channels height width"]:
        channels, height, width = shape
        image = image.convert("L" if channels == 1 else "RGB")
        side = min(image.size) * self.crop
        if image.size != (width, height) or self.crop != 1:
            middle = [(length - side) / 2 for length in image.size]
            box = (middle[0], middle[1], middle[0] + side, middle[1] + side)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box)
        pixels = torch.from_numpy(np.array(image)).float() / 255
        pixels = pixels.reshape(height, width, channels).permute(2, 0, 1)
        mean, std = (torch.as_tensor(x, dtype=torch.float32) for x in (self.mean, self.std))
        return (pixels - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)


def _open(source: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _by_class(images: list[tuple[str, Read]]) -> list[Row]:
    labels = {name: label for label, name in enumerate(sorted({name for name, _ in images}))}
    return [Row(read, labels[name]) for name, read in images]


def _tree(folder: Path, split: str) -> list[tuple[str, Path]]:
    """Class name and file of every image."""
    paths = sorted((folder / split).glob("*/*"))
    return [(path.parent.name, path) for path in paths if path.suffix.lower() in SUFFIXES]


@lru_cache(maxsize=2)
def _archive_rows(path: Path, mtime_ns: int, split: str) -> list[Row]:
    images: list[tuple[str, Read]] = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = Path(member.name).parts
                image = member.name.lower().endswith(SUFFIXES)
                if image and len(parts) >= 3 and parts[-3] == split:
                    file = archive.extractfile(member)
                    assert file is not None
                    images.append((parts[-2], partial(_open, file.read())))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"data.path: {path} cannot be read as a tar archive ({error})") from error
    return _by_class(images)


def _idx_files(folder: Path, split: str) -> list[Path]:
    """MNIST's files of a split, [images, labels]; empty where the folder has none."""
    names = [f"{IDX.get(split, split)}-{kind}" for kind in ("images-idx3", "labels-idx1")]
    matches = [sorted(folder.glob(f"{name}-ubyte*")) for name in names]
    return [paths[0] for paths in matches] if all(matches) else []


def _idx_rows(images: Path, labels: Path) -> list[Row]:
    pixels, numbers = _idx(images), _idx(labels)
    return [
        Row(partial(Image.fromarray, each), int(label))
        for each, label in zip(pixels, numbers, strict=True)
    ]


def _idx(path: Path) -> np.ndarray:
    """The array of an idx file: two zero bytes, type (8: uint8), number of axes, sizes, values."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        kind, axes = struct.unpack(">HBB", content[:4])[1:]
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        if kind != 8:
            raise ValueError(f"type {kind} instead of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{path}: is not an idx file ({error})") from error


@lru_cache(maxsize=2)
def _hub_rows(hub: str, revision: str, split: str, image: str, label: str, place: str) -> list[Row]:
    from datasets import load_dataset  # takes seconds to import; local files do not need it

    log.info("reading the %s split of %s from the hub", split, hub)
    try:
        rows = load_dataset(hub, split=split, revision=None if Path(hub).is_dir() else revision)
    except Exception as error:  # no network, no such repository, a changed layout, …
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.hub: {hub} cannot be read ({type(error).__name__}: {reason}); "
            f"put the images at {place}, as SPLIT/CLASS/FILE in a folder or tar archive"
        ) from error
    for name in (image, label):
        if name not in rows.column_names:
            raise UserError(f"data.image, data.label: {hub} has {', '.join(rows.column_names)}")
    labels = rows[label]
    return [Row(partial(_column, rows, image, at), int(labels[at])) for at in range(len(rows))]


def _column(rows: Any, name: str, at: int) -> Image.Image:
    image: Image.Image = rows[at][name]
    return image
