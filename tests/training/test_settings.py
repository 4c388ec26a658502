"""Settings of training: what cannot be is refused before any model is loaded, with its key."""

import re

import pytest
from helpers.pipeline import run
from hydra import compose

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate

pytestmark = pytest.mark.usefixtures("configured")


GENERATED = "+calibration@method.train=generated"


@pytest.mark.parametrize(
    ("wrong", "chosen"),
    [
        ("trainer.steps=0", ()),
        ("trainer.every=0", ()),
        ("trainer.patience=0", ()),
        ("trainer.precision=16-mixed", ()),
        ("trainer.strategy=deepspeed", ()),
        ("trainer.devices=0", ()),
        ("method.optimizer.weights=-1.0", ()),
        ("method.optimizer.scales=nan", ()),
        ("method.optimizer.clip=0.0", ()),
        ("method.optimizer.warmup=2.0", ()),
        ("method.optimizer.floor=-0.1", ()),
        ("method.optimizer.betas=[0.9]", ()),
        ("method.optimizer.betas=[0.9,1.0]", ()),
        ("method.optimizer.weight_decay=-1.0", ()),
        ("method.rounding.temperature=0.0", ("method/rounding=sigmoid",)),
        ("method.rounding.mode=flat", ("method/rounding=sigmoid",)),
        ("method.rounding.alpha=1.0", ("method/rounding=dsq",)),
        ("method.rounding.delta=-1.0", ("method/rounding=ewgs",)),
        ("method.clamp.sharpness=0.0", ("method/clamp=soft",)),
        ("method.clamp.gate=relu", ("method/clamp=soft",)),
        ("method.clamp.forward=later", ("method/clamp=soft",)),
        ("method.clamp.limit=0.0", ()),
        ("method.scale.init=zero", ()),
        ("method.scale.offset=true", ()),  # lsq's grid is symmetric
        ("method.trained.rank=-1", ()),
        ("method.trained.alpha=0.0", ("method/trained=low_rank",)),
        ("method.loss.task=-1.0", ("method/loss=both",)),
        ("method.loss.shift=-1", ("method/loss=augmented",)),
        ("method.train.greedy=[]", (GENERATED,)),
        ("method.train.top_k=0", (GENERATED,)),
        ("method.train.together=0", (GENERATED,)),
        ("method.blocks.epochs=0", ("method=efficient_qat",)),
        ("method.blocks.sequences=0", ("method=efficient_qat",)),
        ("method.blocks.optimizer.clip=-1.0", ("method=efficient_qat",)),
        ("method.end.optimizer.scales=-1.0", ("method=efficient_qat",)),
        ("method.blocks.steps=-1", ("method=auto_round",)),
        ("method.blocks.unit=row", ("method=auto_round",)),
        ("method.blocks.inputs=both", ("method=auto_round",)),
        ("method.blocks.keep=first", ("method=auto_round",)),
        ("method.blocks.optimizer.rounding=-1.0", ("method=auto_round",)),
        ("method.blocks.optimizer.rounding=-1.0", ("method=adaround",)),
        ("method.blocks.loss_weight=hessian", ("method=brecq",)),
        ("method.blocks.loss_weight=fisher", ("method=adaround",)),
        ("method.blocks.penalty.weight=-1.0", ("method=adaround",)),
        ("method.blocks.penalty.warmup=2.0", ("method=adaround",)),
        ("method.blocks.penalty.beta=[20.0]", ("method=adaround",)),
        ("method.blocks.penalty.anneal=step", ("method=adaround",)),
    ],
)
def test_what_cannot_be_is_refused_before_any_model_is_loaded(wrong, chosen):
    method = () if any(word.startswith("method=") for word in chosen) else ("method=lsq",)
    cfg = compose("config", [*method, *chosen, wrong])
    key = re.escape(wrong.partition("=")[0])
    with pytest.raises(UserError, match=rf"^{key}=[^:]*[: ].*(give|choose) [^:]+\.$"):
        instantiate(cfg.method)


def test_patience_needs_something_to_wait_for():
    cfg = compose("config", ["method=lsq", "trainer.patience=2"])
    with pytest.raises(UserError, match=r"^method\.validation=null: trainer\.patience=2 "):
        instantiate(cfg.method)


@pytest.mark.parametrize("seed", ["-1", "abc", "1.5", str(2**32)])
def test_a_seed_is_a_whole_number(tmp_path, seed):
    with pytest.raises(UserError, match=rf"^seed={seed}: give a whole number from 0"):
        run(tmp_path, "model=tiny_llama", f"seed={seed}", small=[])


@pytest.mark.parametrize(
    ("model", "evaluation", "instead"),
    [
        ("tiny_bert", "held_out", "loss"),
        ("tiny_vit", "held_out", "accuracy"),
        ("tiny_bert", "against_float", "loss"),
        ("tiny_llama", "accuracy", "loss"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_training(
    tmp_path, monkeypatch, model, evaluation, instead
):
    monkeypatch.setattr("qexp.training.trainer.Trainer.fit", lambda *_: pytest.fail("it trained"))
    small = [f"model={model}", "data=synthetic", "progress=false", f"eval={evaluation}"]
    with pytest.raises(UserError, match=f"^eval .*choose eval={instead}$"):
        run(tmp_path, "method=lsq", small=small)
