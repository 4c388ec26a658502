"""What differs between two machines."""

from importlib import metadata

from omegaconf import OmegaConf

from qexp.runs.provenance import processor
from qexp.runs.repeatable import differences, expected, sentence

CPU = {"device": "cpu", "threads": 1, "machine": {"processor": "A"}, "versions": {"torch": "2"}}
GPU = {"device": "cuda:1", "threads": 8, "machine": {"processor": "A"}, "versions": {"torch": "2"}}
GPU["numerics"] = {"device": "H200", "tf32": False, "cublas_workspace": None}


def names(there, here) -> list[str]:
    return [each.name for each in differences(there, here)]


def test_equal_machines_repeat_digits() -> None:
    assert names(CPU, CPU) == names(GPU, GPU) == []
    assert names(GPU, {**GPU, "device": "cuda", "threads": 2}) == []  # of the CPU beside it


def test_of_two_kinds_only_what_both_can_have_is_compared() -> None:
    assert names(CPU, GPU) == ["device"]
    assert names(CPU, {**CPU, "machine": {"processor": "B"}, "threads": 2}) == ["model", "threads"]


def test_of_one_kind_the_model_torch_and_the_settings() -> None:
    other = {**GPU, "versions": {"torch": "3"}}
    other["numerics"] = {"device": "A100", "tf32": True, "cublas_workspace": ":16:8"}
    found = differences(GPU, other)
    assert sentence(found) == (
        "model H200, here A100; torch 2, here 3; numerics.tf32 False, here True"
    )


def test_this_machine_is_expected_to_repeat_itself() -> None:
    here = {"device": "cpu", "machine": {"processor": processor()}}
    here["versions"] = {"torch": metadata.version("torch")}
    cfg = OmegaConf.create({"device": "cpu"})
    assert names(here, expected(cfg)) == []
    cfg.numerics = {"deterministic": True}
    written = {**here, "numerics": {"device": "cpu", "deterministic": False}}
    assert names(written, expected(cfg)) == ["numerics.deterministic"]
