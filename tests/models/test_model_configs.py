"""Every file of conf/model names a source that can be built, without loading anything."""

import pytest
from helpers.models import CONF
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.models.base import ModelSource
from qexp.models.hub import Hub

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
OPEN = {"hub": "id=org/name", "local": "path=folder", "gguf": "path=a.gguf"}  # what they ask for
LARGE = (
    *("gpt2-xl", "llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3.2-1b", "mistral-7b"),
    *("opt-1.3b", "opt-2.7b", "opt-6.7b", "pythia-1.4b", "qwen2.5-1.5b", "qwen3-1.7b", "tinyllama"),
)


def node(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"model/{name}", ["+seed=0", *overrides]).model


@pytest.mark.parametrize("name", [name for name in NAMES if name != "from_run"])
def test_every_model_can_be_chosen(name, monkeypatch):
    monkeypatch.setenv("QEXP_DATA_DIR", "data")
    overrides = [f"model.{OPEN[name]}"] if name in OPEN else []
    source = instantiate(node(name, *overrides))
    assert isinstance(source, ModelSource)
    assert source.dtype == ("auto" if name in OPEN or name in LARGE else "float32")
    if isinstance(source, Hub):
        assert source.id.count("/") == 1 and source.revision == "main"


def test_a_model_without_its_data_folder_says_which_variable(monkeypatch):
    monkeypatch.delenv("QEXP_DATA_DIR", raising=False)
    for name in ("stories260k", "small_gpt2"):
        with pytest.raises(UserError, match="QEXP_DATA_DIR"):
            instantiate(node(name)).files()


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "tiny_llama"])
def test_a_wrong_dtype_is_refused_before_anything_is_loaded(name):
    with pytest.raises(UserError, match=r"model\.dtype: 'int8'"):
        instantiate(node(name, "model.dtype=int8"))
