"""Whole runs on a simulated accelerator: every choice of conf/, equal to the run on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from helpers import rows
from helpers.choices import choices, holder
from helpers.models import FAMILIES, OBJECTIVES, joined, task_of
from helpers.on_device import DEVICE, on_both, reference, small
from helpers.pipeline import answer_or_run
from helpers.simulated_device import Counts, counting, simulated
from hydra import compose

from qexp.cli import command
from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.models.device import place

pytestmark = pytest.mark.usefixtures("configured")

GROUPS = ("activation", "calibration", "eval", "kv", "method", "transform", "weight")
NEEDS = {  # what a choice is not taken without, after the method that has a place for it
    "method=allocated": ["method.budget=3.5", "method.options=[2,3]"],
    "weight=quip": ["method=quip"],
    "weight=slim": ["method=slim"],
    "weight=built_in": ["method=billm"],
    "weight/range=hqq": ["weight=int", "weight.real_zero=true", "weight.include_zero=false"],
    "weight/range=least_squares": ["weight=lsbq"],
    "weight/range=mean": ["weight=ternary"],
    "weight/range=mse_zero": ["weight=int"],
    "transform=dither": ["transform.group_size=2"],
    "transform=spinquant": ["transform.round_weights=true"],
    "kv=kivi": ["kv.grid.group_size=8"],
    "eval=accuracy": ["model=tiny_vit"],
    "eval=gsm8k_5shot": ["eval.gsm8k_5shot.shots=0"],
    "eval=harness": ["eval.harness.tasks=[piqa]"],
    "eval=wikitext2_choose_512x16": ["eval.wikitext2_raw_512x40.split=validation"],
    "calibration=mixture": ["+calibration@calibration.parts.one=synthetic"],
    "calibration=none": ["method=rtn"],
    "calibration=pileval_awq": ["data.words=4"],  # documents shorter than a window
    "method=lq_lora_budget": [
        *("method.start.budget=6", "method.start.quantization.residual.rank=2"),
    ],
    "method=sparsegpt": ["method.solver.sparsity=0.25"],
    "method/hessian=diagonal": ["method=squeezellm"],
    "method/hessian=diagonal_one_pass": ["method=squeezellm"],
    "method/hessian=output_both": ["method=yaqa"],
    "method/loss=augmented": ["method=lsq", "model=tiny_vit", "eval=loss"],
    "method/loss=cross_entropy": ["method=lsq"],
    "method/residual=lq_lora": ["method=rtn"],
    "method/schedule=nearest": ["method/scale=static"],
    "method/schedule=stochastic": ["method/scale=static"],
    "method/trained=adapters": ["method=lsq", "method/adapter=low_rank"],
    "method/trained=channels": ["method=lsq", "activation=int8_tensor"],
    "method/trained=ranges": ["method=lsq", "activation=int8_tensor"],
    "method/trained=scales": ["method=lsq"],
    **{
        f"method/{part}": ["method.budget=3.5", "method.options=[2,3]"]
        for part in (
            *("metric=first_order", "metric=fisher", "metric=hawq", "metric=loss"),
            *("metric=loss_output", "metric=measured", "metric=relative"),
            *("rule=dp", "rule=lagrange", "rule=uniform"),
        )
    },
}


def measured(family: str) -> list[str]:
    """A model, and what measures it."""
    evaluator = "held_out" if OBJECTIVES[family] == "causal_lm" else "loss"
    return [f"model=tiny_{family}", f"eval={evaluator}"]


QUICK = {
    "one block on the device": ["method=gptq", "offload=true", "activation=int8_tensor"],
    "training": ["method=lsq", "activation=int8_token"],
    "outliers": ["method=spqr", "transform=smooth", "kv=int8_token"],
    "images": [*measured("vit"), "method=rtn", "transform=awq"],
}


@pytest.mark.parametrize("name", QUICK)
def test_a_run_gives_the_numbers_of_the_cpu(name: str, tmp_path: Path) -> None:
    on_both(tmp_path, small(*measured("llama"), *QUICK[name]))
    provenance = json.loads((tmp_path / "sim" / "provenance.json").read_text())
    assert provenance["device"] == DEVICE


WIDE = [
    pytest.param(choice, FAMILIES[number % len(FAMILIES)], id=choice)
    for number, choice in enumerate(
        each for each in choices() if each.split("=")[0].split("/")[0] in GROUPS
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "family"), WIDE)
def test_every_choice_gives_the_numbers_of_the_cpu(
    choice: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one family each, in turn; where that family does not take the choice, on Llama."""
    monkeypatch.chdir(tmp_path)
    rows.write(tmp_path / "rows")
    group, _, name = choice.partition("=")
    words = [*holder(group, name), *NEEDS.get(choice, [])]
    method = ["method=gptq" if group == "calibration" else "method=rtn"]
    for model in dict.fromkeys((family, "llama")):
        try:
            on_both(tmp_path / model, small(*measured(model), *method, *words))
            break
        except UserError:
            if model == "llama":
                raise


KINDS = {
    "solver": ["method=gptq", "activation=int8_tensor"],
    "training": ["method=lsq", "activation=int8_tensor"],
    "blocks": ["method=auto_round"],
    "transform": ["method=rtn", "transform=omniquant"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gives_the_numbers_of_the_cpu(kind: str, family: str, tmp_path: Path) -> None:
    on_both(tmp_path, small(*measured(family), *KINDS[kind]))


@pytest.mark.slow
def test_a_run_of_a_device_is_read_on_another(tmp_path: Path) -> None:
    first = small(*measured("llama"), "method=gptq", "activation=int8_tensor")
    on_both(tmp_path / "first", first)
    found = []
    for device in ("cpu", "sim:0"):
        again = compose("config", ["model=from_run", f"run={tmp_path}/first/sim"])
        again.device = device
        with simulated(), reference():
            found.append(answer_or_run(again, tmp_path / device.split(":")[0]))
    assert found[0] == found[1]


@pytest.mark.slow
def test_exports_of_a_run_of_a_device_are_those_of_the_cpu_run(tmp_path: Path) -> None:
    static = ["activation=int8_tensor", "weight=channel", "weight.bits=8"]
    for folder, words in (("static", static), ("weights", ["weight=gguf"])):
        cfg = small(*measured("llama"), "method=gptq", *words)
        if folder == "weights":
            cfg.weight.group_size = 32  # the block of the format
        on_both(tmp_path / folder, cfg)
    for folder, format_ in (("static", "compressed_tensors"), ("weights", "gguf")):
        made = []
        for device in ("cpu", "sim"):
            out = tmp_path / f"{format_}-{device}{'.gguf' if format_ == 'gguf' else ''}"
            words = [str(tmp_path / folder / device), str(out), f"format={format_}"]
            with simulated():
                assert command("export", words) == 0
            if format_ == "gguf":  # the file also has the run's name
                tensors = {each.name: each.data.tobytes() for each in GGUFReader(out).tensors}
            else:
                tensors = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
            made.append(tensors)
        assert made[0] == made[1] != {}


def test_the_device_is_the_one_that_is_named() -> None:
    task = task_of()
    with simulated():
        for name in ("sim:1", "sim:0", "sim"):
            place(task, name, offload=False)
            assert task.device == torch.device(name if ":" in name else "sim:0")
        place(task, "cpu", offload=False)
        place(task, "auto", offload=False)
        assert task.device.type == "sim"
        for name in ("sim:2", "cuda:7"):
            with pytest.raises(UserError, match=f"^device={name} cannot be used here"):
                place(task, name, offload=False)
        place(task, "cpu", offload=False)
    place(task, "auto", offload=False)
    assert task.device == torch.device("cpu")


@torch.no_grad()
def test_offloading_keeps_one_block_on_the_device() -> None:
    task = task_of()
    with simulated():
        place(task, DEVICE, offload=True)
        assert task.device == torch.device(DEVICE)
        seen: list[list[str]] = []
        for block in task.blocks:
            block.register_forward_hook(
                lambda *_: seen.append([next(b.parameters()).device.type for b in task.blocks]),
                prepend=True,
            )
        task.encode(joined("llama"))
        homes = {next(block.parameters()).device.type for block in task.blocks}
    assert seen == [["sim" if b == n else "cpu" for b in range(3)] for n in range(3)]
    assert homes == {"cpu"}


# Synchronisations by a block with its seven linears: 9 for a linear that is rounded to nearest.
BY_BLOCK = {"rtn": 63, "gptq": 92}


@pytest.mark.parametrize("method", BY_BLOCK)
def test_a_block_waits_a_stated_number_of_times(method: str) -> None:
    two, three = (_step(method, blocks).syncs.total() for blocks in (2, 3))
    assert three - two == BY_BLOCK[method]


def _step(method: str, blocks: int) -> Counts:
    """What a method takes on a model of so many blocks."""
    task = task_of()
    del task.blocks[blocks:]
    step = instantiate(small("model=tiny_llama", f"method={method}").method)
    with simulated():
        place(task, DEVICE, offload=False)
        with counting() as counts:
            step(task, lambda: [joined("llama")])
    return counts
