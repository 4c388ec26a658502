"""Models saved by an earlier run: `qexp model=from_run run=FOLDER`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qexp.common.errors import UserError
from qexp.common.hashes import sha256
from qexp.common.on_disk import assign
from qexp.config.instantiate import instantiate
from qexp.models.base import Loaded, ModelSource
from qexp.models.state_diff import apply_diff
from qexp.packed import weights_file
from qexp.quantizers.maps import reinstall
from qexp.quantizers.scheme import attach
from qexp.runs import results
from qexp.task import Task


@dataclass(frozen=True)
class FromRun(ModelSource):
    """The float model of the run with its final weights, all other tensors that it changed, its
    online maps and its activation quantizers."""

    folder: str

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self._origin().dtype

    @property
    def objective(self) -> str:  # type: ignore[override]
        return self._origin().objective

    def loaded(self) -> Loaded:
        config = results.config(self.folder)
        loaded = self._origin().loaded()
        packed, others = weights_file.load(Path(self.folder))
        apply_diff(loaded.model, _under("model.", others))
        _untie(loaded.model)
        for name, form in packed.items():
            weight = loaded.model.get_submodule(name).weight
            assert isinstance(weight, torch.nn.Parameter)
            assign(weight, form.dequantize())
        kinds = instantiate(config.method).activations
        maps = weights_file.maps(Path(self.folder))
        if not maps and instantiate(config.transform).leaves_maps:
            raise UserError(
                f"{self.folder}: {weights_file.FILE} lacks the online maps of transform, without "
                "which its weights are of no use; run the configuration again with "
                "save_weights=true."
            )

        def put_maps(task: Task) -> None:
            reinstall(task, maps, _under("maps.", others))

        def finish(task: Task) -> None:
            attach(task, kinds)
            task.quantizers.load_state_dict(_under("quantizers.", others))
            task.quantizers.to(task.device)

        return Loaded(loaded.model, loaded.tokenizer, finish, put_maps)

    def fingerprint(self) -> dict[str, str]:
        weights = Path(self.folder) / weights_file.FILE
        return self._origin().fingerprint() | {weights_file.FILE: sha256(weights)}

    def files(self) -> list[Path]:
        folder = Path(self.folder)
        results.config(self.folder)
        written = [folder / weights_file.FILE, folder / ".hydra" / "config.yaml"]
        return [*self._origin().files(), *written]

    def settled_dtype(self) -> str:
        return self._origin().settled_dtype()

    def tensor_types(self) -> dict[str, dict[str, int]]:
        return self._origin().tensor_types()

    def origin(self) -> ModelSource:
        return self._origin().origin()

    def _origin(self) -> ModelSource:
        source = instantiate(results.config(self.folder).model)
        assert isinstance(source, ModelSource)
        return source


def _untie(model: PreTrainedModel) -> None:
    """The configuration of a model whose head a step separated from the embedding must say so, or
    a saved and loaded copy ties it again."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = head.weight is embedding.weight


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
