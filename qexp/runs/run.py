"""A finished run: its configuration, its metrics, and where they come from."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qexp.runs import results
from qexp.runs.signature import UNSIGNED, WORDS, class_names

NOT_SETTINGS = (*UNSIGNED, "experiment", "search", "local", "eval")  # each metric has a column
# For runs of version 0.1, whose provenance does not record which metrics are better when higher.
HIGHER = ("acc", "acc_norm", "exact_match", "f1", "mcc", "agreement", "agreed_tokens", "identical")


@dataclass(frozen=True)
class Column:
    """A metric under one definition; two protocols of the same name have two columns."""

    name: str  # "<protocol>/<key>" as in metrics.json
    digest: str  # of the protocol's definition; empty where none was recorded
    higher: bool = False  # whether higher is better

    @property
    def title(self) -> str:
        """The heading of the column."""
        return f"{self.name} [{self.digest}]" if self.digest else self.name

    @property
    def is_perplexity(self) -> bool:
        """Whether it is a perplexity, which is compared on a log scale."""
        return self.name.endswith("/ppl")

    @property
    def is_size(self) -> bool:
        """Whether it is a number of bits."""
        return self.name.endswith("/cache_bits")


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder or from a record."""

    folder: Path  # of the run, or the file of the record
    choices: dict[str, str]  # group → option
    config: dict[str, Any]
    leaves: dict[str, Any]  # dotted key → value as written, interpolations not resolved
    overrides: tuple[str, ...]
    metrics: dict[str, float]
    provenance: dict[str, Any]
    kept_layers: list[dict[str, str]] | None = None  # what a record keeps of `layers.csv`

    @property
    def recorded(self) -> bool:
        """Whether it was read from a record."""
        return self.kept_layers is not None

    @property
    def place(self) -> str:
        """Its folder or file; a record is marked as one."""
        return f"{self.folder} (record)" if self.recorded else str(self.folder)

    @property
    def is_float(self) -> bool:
        """Whether nothing was quantized, so that the run is a baseline."""
        groups = ("method", "activation", "kv", "transform")
        unchanged = all(self.choices.get(group, "none") == "none" for group in groups)
        return unchanged and self.choices.get("model") != "from_run"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Choices of groups, then single keys: everything in which two runs can differ."""
        groups = {
            key: choice
            for key, choice in self.choices.items()
            if not key.startswith("hydra/") and "@eval" not in key and _top(key) not in NOT_SETTINGS
        }
        return groups | self.leaves

    def setting(self, key: str, default: Any = None) -> Any:
        """A choice or a value; `default` where the run has no such key, or reads no grid and the
        key is one of `weight`."""
        if _top(key) == "weight" and not self.uses_grid:
            return default
        return self.choices.get(key, self._values.get(key, default))

    def label(self, key: str) -> str:
        """A choice or a value, formatted for a table; empty where the run has no such key, and
        where the user gave no word."""
        setting = self.setting(key, "")
        return "" if setting is None and key in WORDS else word(setting)

    @property
    def command(self) -> str:
        """The command that repeats this run."""
        return shlex.join(["qexp", *self.overrides])

    @property
    def layers(self) -> list[dict[str, str]]:
        """The rows of `layers.csv`, of which a record keeps name, bits and error; empty where the
        run quantized nothing."""
        return results.layers(self.folder) if self.kept_layers is None else self.kept_layers

    @property
    def columns(self) -> list[Column]:
        """Perplexities, ratios, bits of a cache, and every other metric with a standard error."""
        protocols = self.provenance.get("protocols", {})
        names = [
            name
            for name in self.metrics
            if name.endswith(("/ppl", "/ratio", "/cache_bits")) or f"{name}_stderr" in self.metrics
        ]
        return [self._column(name, protocols.get(name.rpartition("/")[0], {})) for name in names]

    def _column(self, name: str, protocol: Mapping[str, Any]) -> Column:
        # Evaluators list metrics, not their changes from the float model (`against_float.changes`).
        key = name.rpartition("/")[2]
        listed = key.removesuffix("_change") in protocol.get("higher_is_better", HIGHER)
        higher = listed or key.endswith("wrong_to_right")
        return Column(name, protocol.get("digest", ""), higher)

    @cached_property
    def uses_grid(self) -> bool:
        """Whether any key refers to `weight`; a method may define its grid itself."""
        return any("${weight" in str(value) for value in self.leaves.values())

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage["seconds"] for stage in self._stages)

    def peak(self, kind: str) -> float:
        """Highest `peak_<kind>_bytes` of any stage, in GB; NaN where none was measured."""
        peaks = [stage.get(f"peak_{kind}_bytes") for stage in self._stages]
        return max((peak / 1e9 for peak in peaks if peak is not None), default=math.nan)

    def value(self, name: str) -> float:
        """A metric by its name, or a number of the configuration by its dotted key; else NaN."""
        if name in self.metrics:
            return self.metrics[name]
        setting = self._values.get(name)
        return float(setting) if isinstance(setting, int | float) else math.nan

    @cached_property
    def _values(self) -> dict[str, Any]:
        return flat(self.config)

    @property
    def _stages(self) -> list[dict[str, Any]]:
        return list(self.provenance.get("stages", {}).values())


def word(value: Any) -> str:
    """A value of a configuration as a label."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def flat(tree: Any, above: str = "", without: Sequence[str] = ()) -> dict[str, Any]:
    """Dotted key → value. A list is one value; a `_target_` is a class name without its module.

    without: top-level keys to leave out.
    """
    leaves: dict[str, Any] = {}
    for key, value in class_names(tree).items():
        if key not in without:
            full = f"{above}{key}"
            leaves |= flat(value, f"{full}.") if isinstance(value, dict) else {full: value}
    return leaves


def _top(key: str) -> str:
    return key.partition(".")[0].partition("/")[0].partition("@")[0]
