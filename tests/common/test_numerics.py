"""Settings of the digits that a device may change."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf

from qexp import pipeline
from qexp.common import numerics
from qexp.common.errors import UserError
from qexp.common.numerics import Numerics
from qexp.runs import results

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(numerics, "_environment", None)
    monkeypatch.delenv(numerics.WORKSPACE, raising=False)
    yield
    Numerics().apply()


def seen() -> tuple[bool, ...]:
    """What torch computes with: TF32 in products and convolutions, sums of both 16-bit dtypes."""
    products = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision() != "highest",
        torch.backends.cudnn.allow_tf32,
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def test_they_reach_torch_and_go_back_to_the_defaults() -> None:
    Numerics(tf32=True, reduced_sums=True, deterministic=True).apply()
    assert all(seen())
    Numerics().apply()
    assert not any(seen())


def test_the_workspace_is_that_of_the_last_settings(monkeypatch) -> None:
    Numerics(deterministic=True).apply()
    assert os.environ[numerics.WORKSPACE] == numerics.REPEATING
    Numerics(cublas_workspace=":16:8", deterministic=True).apply()
    assert os.environ[numerics.WORKSPACE] == ":16:8"
    Numerics().apply()
    assert numerics.WORKSPACE not in os.environ
    monkeypatch.setattr(numerics, "_environment", ":32:2")
    Numerics().apply()
    assert os.environ[numerics.WORKSPACE] == ":32:2"


def test_a_process_that_uses_cuda_keeps_its_workspace(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    Numerics(tf32=True).apply()  # changes nothing that cuBLAS has read
    with pytest.raises(UserError, match="begun with None and cannot change to :16:8"):
        Numerics(cublas_workspace=":16:8").apply()
    assert numerics.current() == Numerics(tf32=True) and numerics.WORKSPACE not in os.environ


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"tf32": "maybe"}, "numerics.tf32=maybe: give true or false."),
        ({"cublas_workspace": "4096"}, "numerics.cublas_workspace=4096: give buffers"),
        ({"tf23": True}, "numerics.tf23: is unknown; the keys are tf32"),
        (3, "numerics=3: give single fields"),
    ],
)
def test_what_cannot_be_is_refused(node, said) -> None:
    with pytest.raises(UserError) as refusal:
        numerics.of(OmegaConf.create({"numerics": node}))
    assert said in str(refusal.value)


def test_a_cached_tensor_of_other_numerics_is_another_one() -> None:
    keys = []
    for settings in (Numerics(), Numerics(tf32=True), Numerics(deterministic=True)):
        settings.apply()
        keys.append(str(numerics.identity(CPU)))
    assert len(set(keys)) == 3 and keys[0] == "{'device': 'cpu'}"


def test_a_run_applies_and_records_them(configured, tmp_path, own_cache) -> None:
    words = ["model=tiny_llama", "method=gptq", "weight.group_size=32", "data=synthetic"]
    words += ["calibration=synthetic", "eval.held_out.limit=1", "save_weights=false"]
    cfg = compose("config", [*words, "numerics.deterministic=true"])
    found = []
    for name in ("a", "b"):
        pipeline.run(cfg, tmp_path / name)
        assert numerics.current() == replace(Numerics(), deterministic=True)
        found.append(results.metrics(tmp_path / name))
    assert found[0] == found[1]
    recorded = results.provenance(tmp_path / "a")["numerics"]
    assert recorded == {
        **{"device": "cpu", "tf32": False, "reduced_sums": False},
        **{"deterministic": True, "cublas_workspace": numerics.REPEATING},
    }


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_products_are_whole_unless_tf32_is_allowed(tf32, accelerator) -> None:
    if accelerator.type != "cuda":
        pytest.skip("no CUDA device")
    Numerics(tf32=tf32).apply()
    x = torch.randn(1024, 1024, device=accelerator)
    error = float((x @ x - (x.double() @ x.double())).abs().max())
    assert (error > 1e-2) == (tf32 and torch.cuda.get_device_capability()[0] >= 8)


@pytest.mark.parametrize(("capability", "lines"), [("AVX2", 1), ("AVX512", 0), ("SVE256", 0)])
def test_slow_bfloat16_is_named_once(capability, lines, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    numerics.warn_of_slow_bfloat16.cache_clear()
    for kind in ("cuda", "cpu", "cpu"):
        numerics.warn_of_slow_bfloat16("trainer.precision=bf16-mixed", kind)
    assert caplog.text.count("trainer.precision=bf16-mixed: this processor has no AVX-512") == lines
    numerics.warn_of_slow_bfloat16.cache_clear()
