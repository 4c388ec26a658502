"""A finished run as exports read it: model, stored forms, inputs of linears, facts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexp.common import on_disk
from qexp.common.errors import UserError
from qexp.common.lazily import Lazily
from qexp.config.instantiate import instantiate
from qexp.models import gguf_file
from qexp.models.code_formats import FORMATS, CodeFormat
from qexp.models.from_run import FromRun
from qexp.models.input_ranges import Inputs, of_task
from qexp.models.linearize import has_transposed, published
from qexp.packed import weights_file
from qexp.packed.base import Packed
from qexp.packed.coded import Coded
from qexp.packed.formats import gguf
from qexp.packed.formats.checks import coded_refusal
from qexp.quantizers.scheme import Activations, FloatActivations
from qexp.runs import results
from qexp.runs.signature import signature
from qexp.task import TASKS, Task

Refusal = Callable[[Coded], str | None]
WRITER = 1  # of the folder's facts; raised when an export of the same run changes


@dataclass(frozen=True)
class ExportedRun:
    """One finished run. `task` holds the model with its final weights and quantizers."""

    folder: Path
    cfg: DictConfig
    task: Task
    packed: Mapping[str, Packed]
    kinds: tuple[Activations, ...]

    @staticmethod
    def read(folder: Path) -> "ExportedRun":
        """UserError for a run that did not finish, or whose weights were not saved."""
        cfg = results.config(str(folder))
        packed, _ = weights_file.load(folder)
        source = FromRun(str(folder))
        loaded = source.loaded()
        task = TASKS[source.objective](loaded.model, loaded.tokenizer)
        loaded.put_maps(task)
        loaded.finish(task)
        return ExportedRun(folder, cfg, task, packed, tuple(instantiate(cfg.method).activations))

    @property
    def model(self) -> PreTrainedModel:
        return self.task.model

    @property
    def is_streamed(self) -> bool:
        """Whether its weights stay on disk (`model.load=stream`)."""
        return on_disk.is_mapped(next(self.model.parameters()))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.task.tokenizer

    def refuse_maps(self) -> None:
        """UserError where weights need online maps."""
        if self.task.maps:
            raise UserError(
                f"{self.folder}: its model computes online maps (transform), which no format of "
                "other software holds; give the transform without them (transform=rotate)"
            )

    def refuse_activations(self) -> None:
        """UserError where activations are quantized, or mapped online."""
        self.refuse_maps()
        if self.task.quantizers or any(
            not isinstance(kind, FloatActivations) for kind in self.kinds
        ):
            raise UserError(
                f"{self.folder}: its activations are quantized, which a model folder cannot hold "
                "(activation, kv); format=compressed_tensors holds 8-bit inputs of linears"
            )

    def coded(
        self, refusal: Refusal, change: Callable[[Coded], Coded] | None = None
    ) -> Mapping[str, Coded]:
        """The matrices by name, all of which a format holds after the `change`; of a streamed model
        each is read when it is asked for. UserError, with the run's key, for the first that a
        format does not hold."""
        self.refuse_maps()
        if not self.packed:
            raise UserError("method: the run quantized no weights; say format=float")

        def checked(name: str) -> Coded:
            packed = self.packed[name]
            said = coded_refusal(packed)
            if said is None:
                assert isinstance(packed, Coded)
                packed = packed if change is None else change(packed)
                said = refusal(packed)
            if said is not None:
                raise UserError(f"{said} ({name})")
            assert isinstance(packed, Coded)
            return packed

        lazily = Lazily(self.packed, checked)
        found: Mapping[str, Coded] = lazily if self.is_streamed else dict(lazily)
        for name in self.packed if self.is_streamed else ():
            checked(name)
        if has_transposed(self.model):
            raise UserError(
                "model: the family's own layers store transposed weights (Conv1D), for which "
                "readers have no codes"
            )
        return found

    def inputs(self, format: CodeFormat) -> Inputs | None:
        """The quantized inputs of linears. UserError in a format without them."""
        if format is not FORMATS["compressed_tensors"]:
            self.refuse_activations()
        return of_task(self.task, self.kinds)

    def with_codes(
        self, format: CodeFormat, coded: Mapping[str, Coded]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state with codes in the place of their weights, and the section of config.json."""
        inputs = self.inputs(format)
        scheme = {} if inputs is None else {"inputs": inputs.scheme}
        state = dict(published(self.model))
        for name, each in coded.items():
            del state[f"{name}.weight"]
            tensors = format.write(each, **scheme)
            if inputs is not None and inputs.tensors:
                if "weight" not in tensors:
                    raise UserError(
                        "activation=int8_tensor: static inputs need symmetric 8-bit weights with "
                        f"one scale a row; say weight=channel weight.bits=8 ({name})"
                    )
                tensors |= {key: each.clone() for key, each in inputs.tensors[name].items()}
            for end, tensor in tensors.items():
                whole = tensor.contiguous()
                state[f"{name}.{end}"] = on_disk.copied(whole) if self.is_streamed else whole
        floats = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name not in coded
        ]
        return state, format.config(coded, floats, **scheme)

    def bits(self, state: Mapping[str, Tensor], coded: Mapping[str, Coded]) -> float | None:
        """Bits per weight of what a file holds of the quantized linears, their biases excepted."""
        weights = sum(each.codes.numel() for each in coded.values())
        if not weights:
            return None
        size = 0
        for key, tensor in state.items():
            parts = key.split(".")
            if not key.endswith(".bias") and any(
                ".".join(parts[:stop]) in coded for stop in range(1, len(parts))
            ):
                size += 8 * tensor.numel() * tensor.element_size()
        return size / weights

    def facts(self, format: str) -> dict[str, Any]:
        """What `qexp.json` says of the run."""
        provenance = results.provenance(self.folder)
        metrics = results.metrics(self.folder)
        protocols = provenance.get("protocols", {})
        return {
            "run": signature(self.cfg),
            "revision": provenance.get("git", {}).get("revision"),
            "format": format,
            "writer": WRITER,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "run_bits": metrics.get("weight/bits"),
            "protocols": {name: entry["digest"] for name, entry in protocols.items()},
            "metrics": {name: value for name, value in metrics.items() if "/" in name},
        }

    def overrides(self) -> list[str]:
        """The overrides of the run's command; empty where the folder does not name them."""
        try:
            return results.overrides(self.folder)
        except OSError:
            return []

    def gguf_fit(self) -> str:
        """Whether GGUF holds the run."""
        try:
            self.refuse_activations()
            coded = self.coded(gguf.refusal)
            content = gguf_file.Content(self.model, self.tokenizer, coded, self.gguf_origin())
            names, bits = content.summary()
        except UserError as error:
            return f"no: {error}"
        return f"exact in {' and '.join(names)}, {bits:.2f} bits a weight"

    def gguf_origin(self) -> Path | None:
        """The GGUF file that the run's model came from."""
        files = instantiate(self.cfg.model).files()
        return next((path for path in files if path.suffix == ".gguf"), None)

    def float_fit(self) -> str:
        """Whether a float folder holds the run."""
        try:
            self.refuse_activations()
            state = published(self.model)
        except UserError as error:
            return f"no: {error}"
        dtypes = {str(t.dtype).removeprefix("torch.") for t in state.values()}
        return f"exact, {' and '.join(sorted(dtypes))}"
