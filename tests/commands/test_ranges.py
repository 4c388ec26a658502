"""The figure of a run's ranges agrees with the tensors."""

import pytest
import torch
from helpers.channels import TENSOR, logits, planted
from helpers.models import joined, task_of
from helpers.pipeline import run

from qexp.cli import command
from qexp.commands import ranges
from qexp.quantizers.scheme import quantize_activations

pytestmark = pytest.mark.usefixtures("configured")


def test_ranges_and_errors_are_those_of_the_tensors():
    batch, task = joined("gpt2"), task_of("gpt2")
    plain = task_of("gpt2")
    seen: list[torch.Tensor] = []
    linear = plain.blocks[0].attn.c_attn  # its input no quantizer has touched yet
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(plain, batch)
    handle.remove()
    quantize_activations(task, [TENSOR], lambda: [batch])
    found = ranges.watch(task, [batch])
    assert len(found) == 4 * len(task.blocks)
    first = found["transformer.h.0.attn.c_attn.input"]
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(first.low, x.amin(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.high, x.amax(0), rtol=1e-4, atol=1e-5)
    ends = torch.tensor([[float(x.min()), float(x.max())]])
    q = TENSOR.grid.fit(ends)
    error = (TENSOR.grid.round(x.reshape(1, -1), q) - x.reshape(1, -1)).square().sum()
    assert first.error == pytest.approx(float(error / x.square().sum()), rel=1e-3)


def test_a_folded_scale_shows(tmp_path):
    """Outliers in two channels: the same function with them costs more at every norm's output."""
    errors = []
    for task in (planted("opt", 50), task_of("opt")):
        quantize_activations(task, [TENSOR], lambda: [joined("opt")])
        found = ranges.watch(task, [joined("opt")])

        errors.append({name: each.error for name, each in found.items()})
    planted_, plain = errors
    for name in plain:
        if name.endswith(("q_proj.input", "fc1.input")):
            assert plain[name] < planted_[name]


def test_the_command_draws_a_run(tmp_path, capsys):
    run(tmp_path, "model=tiny_opt", "method=rtn", "transform=smooth", "activation=int8_tensor")
    assert command("ranges", [str(tmp_path)]) == 0
    assert (tmp_path / "ranges.png").read_bytes().startswith(b"\x89PNG")
    assert ".input, float model" in capsys.readouterr().out
    assert command("ranges", [str(tmp_path), "--site", "head"]) == 1
    assert "no such site" in capsys.readouterr().err
    run(tmp_path / "float", "model=tiny_opt", "method=rtn")
    assert command("ranges", [str(tmp_path / "float")]) == 1
    assert "activations are float" in capsys.readouterr().err
