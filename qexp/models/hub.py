"""Models of the Hugging Face hub, downloaded once into the hub's cache."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import http_backoff, httpx
from safetensors import SafetensorError
from transformers.utils import cached_file

from qexp.common.errors import UserError, first_line
from qexp.models.base import AUTO_DTYPE, Loaded, ModelSource, check, ready
from qexp.models.local import Local
from qexp.models.pretrained import (
    Head,
    checkpoint_dtype,
    marked,
    pretrained,
    refuse_quantized,
    tokenizer_of,
)
from qexp.models.shards import STREAM, check_load


@dataclass(frozen=True)
class Hub(ModelSource):
    """Any hub id, at a branch, tag or commit.

    Gated models need `HF_TOKEN`. `HF_HOME` moves the cache, `HF_HUB_OFFLINE=1` uses only the cache.
    load: as of `Local`.
    """

    id: str
    revision: str = "main"
    dtype: str = AUTO_DTYPE
    objective: str = "causal_lm"
    head: Head | None = None
    load: str = "whole"

    def __post_init__(self) -> None:
        check(self, auto=True)
        check_load(self.load, self.head)
        if Path(self.id).is_dir():  # transformers would silently prefer it to the hub's
            raise UserError(
                f"model.id: {self.id} is a folder here; use model=local model.path={self.id}"
            )

    def loaded(self) -> Loaded:
        snapshot = self._snapshot()  # one commit for weights and tokenizer, even if main moves
        refuse_quantized(json.loads((snapshot / "config.json").read_text()), self._name)
        options = {**self._options, "revision": snapshot.name}
        try:
            if self.load == STREAM:
                patterns = ["model*.safetensors", "model.safetensors.index.json"]
                snapshot_download(self.id, allow_patterns=patterns, **options)
                copy = Local(str(snapshot), self.dtype, self.objective, load=STREAM)
                model = copy.loaded().model
            else:
                model = pretrained(self.id, self._name, self, self.head, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise self._refused(error) from error
        return Loaded(ready(model), tokenizer_of(self.id, self._name, self, **options))

    def fingerprint(self) -> dict[str, str]:
        own = {"model": self.id, "revision": self._snapshot().name, "dtype": self.settled_dtype()}
        return marked(own, self.head)

    def settled_dtype(self) -> str:
        if self.dtype != AUTO_DTYPE:
            return self.dtype
        return checkpoint_dtype(str(self._snapshot()), self._name, self)

    def config_folder(self) -> Path | None:
        try:
            own = {"revision": self.revision, "local_files_only": True}
            return Path(cached_file(self.id, "config.json", **own)).parent
        except OSError:
            return None

    def files(self) -> list[Path]:
        """Empty: the commit in `fingerprint` determines the content."""
        return []

    @property
    def _name(self) -> str:
        return f"model.id: {self.id} (revision {self.revision})"

    @property
    def _options(self) -> dict[str, Any]:
        return {"revision": self.revision, "local_files_only": not _reachable(constants.ENDPOINT)}

    def _snapshot(self) -> Path:
        """The folder of the commit that `revision` names, in the hub's cache."""
        try:
            return Path(cached_file(self.id, "config.json", **self._options)).parent
        except (OSError, ValueError) as error:
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> UserError:
        return UserError(
            f"{self._name} can be neither downloaded nor found in the local cache "
            f"({first_line(error)}); for a copy on this disk use model=local model.path=FOLDER"
        )


@cache
def _reachable(endpoint: str) -> bool:
    """Whether the endpoint accepts connections. A download would retry for 25 s before it fails."""
    try:
        http_backoff("HEAD", endpoint, max_retries=1, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OfflineModeIsEnabled, httpx.ConnectError):
        return False
    except (OSError, httpx.HTTPError):  # an answer, or a timeout: the download reports the error
        return True
    return True
