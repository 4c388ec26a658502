"""Finished runs for tests of exports. They need the fixture `configured`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import batches
from helpers.pipeline import SMALL, run

from qexp.models.base import ModelSource

LLAMA = ("model=tiny_llama", "method=rtn")
MEASURED = (*LLAMA, "eval=held_out")
W8 = ("weight=channel", "weight.bits=8", "weight.group_size=null")
INPUTS = {
    "token": (*MEASURED, "activation=int8_token"),
    "tensor": (*MEASURED, *W8, "activation=int8_tensor"),
    "symmetric": (*MEASURED, *W8, "activation=int8_tensor", "activation.grid.symmetric=true"),
}
NO_EVAL = ["data=synthetic", "calibration.sequences=2", "calibration.length=32", "eval=none"]


def folders_of(factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folders("model=…", …)`: the folder of a finished run, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = factory.mktemp("run")
            measured = "eval=held_out" in overrides
            small = SMALL if measured else [*NO_EVAL, "weight.group_size=32"]
            run(made[overrides], *overrides, small=small)
            words = "".join(f"- {word}\n" for word in overrides)
            (made[overrides] / ".hydra" / "overrides.yaml").write_text(words)
        return made[overrides]

    return of


@torch.no_grad()
def logits(source: ModelSource) -> torch.Tensor:
    return source.loaded().model(**batches("llama")[0]).logits
