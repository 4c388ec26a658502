"""Models of the Hugging Face hub, downloaded once into its own cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from qexp.errors import UserError
from qexp.models.pretrained import first_line, pretrained, refuse_quantized, tokenizer_of
from qexp.models.source import Loaded, Source, check, ready


@dataclass(frozen=True)
class Hub(Source):
    """Any hub id, at a branch, tag or commit.

    Gated models need `HF_TOKEN`; `HF_HOME` moves the cache, `HF_HUB_OFFLINE=1` uses nothing else.
    """

    id: str
    revision: str = "main"
    dtype: str = "float32"
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self)
        if Path(self.id).is_dir():  # transformers would silently prefer it to the hub's
            raise UserError(
                f"model.id: {self.id} is a folder here; use model=local model.path={self.id}"
            )

    def load(self) -> Loaded:
        snapshot = self._snapshot()  # one commit for weights and tokenizer, even if main moves
        refuse_quantized(json.loads((snapshot / "config.json").read_text()), self._name)
        revision = {"revision": snapshot.name}
        try:
            model = pretrained(self.id, self._name, self, **revision)
        except (OSError, ValueError, SafetensorError) as error:
            raise self._refused(error) from error
        return Loaded(ready(model), tokenizer_of(self.id, self._name, self, **revision))

    def fingerprint(self) -> dict[str, str]:
        return {"model": self.id, "revision": self._snapshot().name, "dtype": self.dtype}

    def files(self) -> list[Path]:
        """None: a commit is its content, and `fingerprint` holds it."""
        return []

    @property
    def _name(self) -> str:
        return f"model.id: {self.id} (revision {self.revision})"

    def _snapshot(self) -> Path:
        """The folder of the commit that `revision` names, in the hub's cache."""
        options: dict[str, Any] = {"revision": self.revision}
        try:
            return Path(cached_file(self.id, "config.json", **options)).parent
        except (OSError, ValueError) as error:
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> UserError:
        return UserError(
            f"{self._name} can neither be fetched nor found in the local cache "
            f"({first_line(error)}); for a copy on this disk use model=local model.path=FOLDER"
        )
