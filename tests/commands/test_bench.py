"""Every bench runs on a tiny model and says what it is about."""

import logging
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from qexp.cli import command
from qexp.commands import bench
from qexp.common.errors import UserError

TINY = ("model=tiny_gpt2", "data=synthetic", "calibration.sequences=2", "calibration.length=16")
TENSOR = ("weight=channel", "weight.bits=8", "activation=int8_tensor")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("blockwise",), "whole job"),
        (("transform", "transform=awq", "transform.points=2", "+blocks=2"), "x method"),
        (("evaluation", "eval.held_out.length=16", "eval.held_out.limit=2"), "quantized"),
        (("qat", "method=qat", *TENSOR), "x float"),
        (("quadapter", "transform=quadapter", "method=quadapter", "transform.steps=2", *TENSOR),
         "memory, phase 2"),
        (("penalty", "method=quanttune", *TENSOR), "throughput with penalty"),
        (("ranges", "weight/range=mse", "weight.group_size=16"), "whole layers"),
        (("methods", "+methods=[rtn,\"gptq method.solver.damp=0.1\"]", "weight.group_size=16"),
         "gptq method.solver.damp=0.1"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_bench_ends_in_ratios(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path))  # put back afterwards
    bench.main([*words, *TINY])
    printed = capsys.readouterr().out
    assert said in printed and "GiB" in printed


def test_jobs_are_run_with_and_without_a_shared_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path))
    words = ["sharing", *TINY, "weight.group_size=32", "logger=none", "eval=none"]
    monkeypatch.setattr(
        sys.modules["qexp.commands.bench.sharing"], "HESSIANS", {"gptq": "activation"}
    )
    before = logging.getLogger().handlers[:]
    bench.main(words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["gptq", "gptq", "gptq", "all"]
    assert lines[0][3] == lines[0][5]  # run once
    assert logging.getLogger().handlers == before  # the jobs' folders are gone


@pytest.mark.slow  # three processes
def test_memory_is_that_of_every_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path))
    small = ["weight.group_size=32", "eval.held_out.length=16", "eval.held_out.limit=2"]
    bench.main(["memory", "model=tiny_llama", *TINY[1:], *small, "method=rtn"])
    lines = capsys.readouterr().out.splitlines()
    stages = [line[:32].strip() for line in lines[1:]]
    assert stages[:2] == ["interpreter and libraries", "load"]
    assert "quantize" in stages and stages[-1] == "export format=float"
    assert all("MiB" in line for line in lines[1:])


def test_the_page_is_measured_or_a_browser_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path))
    module = sys.modules["qexp.commands.bench.page"]
    words = ["page", *TINY, "weight.group_size=32", "eval=loss"]
    with monkeypatch.context() as without:
        without.setattr(module, "find", lambda: None)
        with pytest.raises(UserError, match="CHROME_BIN"):
            bench.main(words)
    measured = []
    monkeypatch.setattr(module, "find", lambda: "browser")
    monkeypatch.setattr(module, "measure", lambda _, file: measured.append(file.read_text()))
    monkeypatch.setattr(module, "METHODS", ("rtn",))
    monkeypatch.setattr(module, "RUNS", 5)
    bench.main(words)
    assert "5 settings, 5 runs" in measured[0]
    assert "5 runs, written in" in capsys.readouterr().out


def test_an_unknown_bench_is_named():
    with pytest.raises(UserError, match="blockwise"):
        bench.main(["speed"])


def test_what_the_user_can_put_right_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    words = ["quadapter", *TINY, "transform=quadapter", "transform.sites=all"]
    assert command("bench", words) == 1
    assert "transform.sites=all" in (said := capsys.readouterr().err) and "Traceback" not in said
