"""Cache of converted models, for formats that are slow to convert."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import transformers
from filelock import FileLock

from qexp.common.cache_entries import default_folder
from qexp.common.files import atomic_folder
from qexp.common.hashes import sha256
from qexp.models.base import Loaded, ModelSource
from qexp.models.pretrained import pretrained, tokenizer_of

log = logging.getLogger(__name__)

SUMS = "sha256.json"
FORM = (
    3  # since 2 a tokenizer follows its file's flag for BOS, since 3 the model its rotary factors
)


def kept(source: ModelSource, convert: Callable[[], Loaded]) -> Loaded:
    """The result of `convert`, read from the cache folder if it is there (4 bytes per weight).

    The folder's name is a hash of everything that the model depends on. Its files are checked by
    sha256; a damaged folder is converted again. A cache that cannot be written only causes a
    warning.
    """
    key = {**source.fingerprint(), "objective": source.objective, "by": transformers.__version__}
    key["form"] = str(FORM)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = default_folder() / "converted" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_intact(folder):
                loaded = convert()
                _store(loaded, folder)
                return loaded
    except OSError as error:
        log.warning("%s cannot be written (%s); continuing without it", folder, error)
        return convert()
    name = f"cache {folder}"
    model = pretrained(str(folder), name, source, local_files_only=True)
    return Loaded(model, tokenizer_of(str(folder), name, source, local_files_only=True))


def _store(loaded: Loaded, folder: Path) -> None:
    try:
        with atomic_folder(folder) as temporary:
            loaded.model.save_pretrained(temporary)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(temporary)
            sums = {path.name: sha256(path) for path in temporary.iterdir()}
            (temporary / SUMS).write_text(json.dumps(sums))
            shutil.rmtree(folder, ignore_errors=True)
    except Exception as error:  # a full disk raises a different exception in every writer
        log.warning("%s was not written (%s); continuing without it", folder, error)


def _is_intact(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        sums = json.loads((folder / SUMS).read_text())
        intact = all(sha256(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        intact = False
    if not intact:
        log.warning("%s is damaged; converting again", folder)
    return intact
