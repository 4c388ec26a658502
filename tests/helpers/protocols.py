"""The named protocols in small, and losses from all logits at once to compare them with."""

from pathlib import Path

import torch
from helpers.models import CONF, tiny
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy

from qexp.data.corpus import Corpus
from qexp.data.synthetic import Synthetic
from qexp.eval.base import Evaluator, FloatModel
from qexp.task import TASKS, CausalLM

CORPUS = Synthetic(count=30, words=20)


def protocol(choice: str, corpus: Corpus = CORPUS, **fields: object) -> Evaluator:
    """conf/eval/<choice>.yaml on another corpus, in small."""
    data = {"name": corpus.name, "evaluation_split": "test"}
    whole = OmegaConf.create({"data": data, "seed": 0, "eval": {}})
    whole.eval = OmegaConf.load(CONF / "eval" / f"{choice}.yaml")
    [node] = whole.eval.values()
    kind = get_class(node._target_)
    del node._target_, node.corpus
    node.update(fields)  # before the name, which some fields are part of
    return kind(corpus=corpus, **node)


def llama(family: str = "llama") -> CausalLM:
    task = TASKS["causal_lm"](*tiny(family)[:2]).eval()
    assert isinstance(task, CausalLM)
    return task


def ids_of(task: CausalLM, text: str) -> Tensor:
    return torch.tensor([task.tokenizer(text)["input_ids"]])


@torch.no_grad()
def full_losses(task: CausalLM, ids: Tensor) -> Tensor:
    """Of tokens 1, 2, … from all logits at once."""
    logits = task.model(input_ids=ids).logits
    return cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def changed(scale: float) -> CausalLM:
    """The tiny model with noise on the parameters of its blocks."""
    task = llama()
    generator = torch.Generator().manual_seed(0)
    for parameter in task.blocks.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return task


def start(task: CausalLM, folder: Path) -> FloatModel:
    """`task` as the float model of a run in `folder`."""
    return FloatModel({"weights": "w"}, lambda: task, folder)
