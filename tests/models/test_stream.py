"""Models that stay on disk give what those in memory give, bit for bit."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.models import tiny
from helpers.pipeline import run
from safetensors.torch import load_file
from torch import nn

from qexp.common import on_disk
from qexp.common.errors import UserError
from qexp.models import footprint
from qexp.models.export import export
from qexp.models.local import Local
from qexp.packed import weights_file

pytestmark = pytest.mark.usefixtures("configured")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, in several shards."""
    where = tmp_path_factory.mktemp("checkpoint")
    loaded = tiny("llama")
    loaded.model.to(torch.bfloat16).save_pretrained(where, max_shard_size="100KB")
    loaded.tokenizer.save_pretrained(where)
    assert len(list(where.glob("*.safetensors"))) > 1
    return where


def both(tmp_path: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    model = ("model=local", f"model.path={folder}", *overrides)
    return [run(tmp_path / load, *model, f"model.load={load}") for load in ("whole", "stream")]


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=rtn",),
        ("method=gptq", "model.dtype=bfloat16"),
        ("method=gptq", "method.chunk=2", "memory=0"),
        ("method=gptq", "method.propagate=false", "method.chunk=2", "memory=0"),
        ("method=spqr",),
        ("method=gptaq", "memory=0"),
        ("method=rtn", "transform=smooth", "activation=int8_token"),
        ("method=gptq", "transform=awq"),
        ("method=rtn", "transform=rotate"),
        ("method=oac",),
    ],
    ids=" ".join,
)
def test_a_streamed_run_is_the_whole_one(tmp_path, folder, overrides):
    whole, stream = both(tmp_path, folder, *overrides)
    assert whole == stream
    one, other = (load_file(tmp_path / load / weights_file.FILE) for load in ("whole", "stream"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_its_weights_stay_mapped(tmp_path, folder):
    model = Local(str(folder), load="stream").loaded().model
    assert all(map(on_disk.is_mapped, model.parameters()))


def test_loading_it_leaves_the_random_state(folder):
    state = torch.get_rng_state()
    Local(str(folder), load="stream").loaded()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("format", ["float", "compressed_tensors"])
def test_its_export_is_that_of_the_whole_run(tmp_path, folder, format):
    both(tmp_path, folder, "method=rtn", "model.dtype=bfloat16")
    files = {}
    for load in ("whole", "stream"):
        facts = export(tmp_path / load, tmp_path / f"out_{load}", format)
        out = tmp_path / f"out_{load}"
        files[load] = {
            path.name: path.read_bytes()
            for path in out.iterdir()
            if path.name not in ("qexp.json", "README.md")  # dates, and what was verified
        }
        assert facts["verified"][0]["matrices"] == (0 if format == "float" else 21)
    assert "model.load=stream" in facts["verified"][1]["skipped"]
    assert files["whole"] == files["stream"]
    loaded = [
        Local(str(tmp_path / "out_stream"), "bfloat16", load=load).loaded().model
        for load in ("whole", "stream")
    ]
    for name, tensor in loaded[0].state_dict().items():
        assert torch.equal(tensor, loaded[1].state_dict()[name])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=lsq", "trainer=smoke"), "model.load=stream: training needs the whole model"),
        (("model.load=lazy",), "model.load=lazy.*whole or stream"),
        (("memory=-1",), "memory"),
    ],
)
def test_a_refusal_names_its_key(tmp_path, folder, overrides, said):
    words = ("model=local", f"model.path={folder}", "model.load=stream", *overrides)
    with pytest.raises(UserError, match=said):
        run(tmp_path, *words)
    assert not (tmp_path / "metrics.json").exists()


def test_a_run_that_cannot_fit_is_refused_before_it_loads(tmp_path, folder, monkeypatch):
    class Little:
        available = 100_000

    monkeypatch.setattr(footprint.psutil, "virtual_memory", Little)
    monkeypatch.setattr(Local, "loaded", None)  # must not be called
    words = ("model=local", f"model.path={folder}", "method=rtn")
    with pytest.raises(UserError, match=r"model.load=whole.*say model.load=stream"):
        run(tmp_path, *words)
    with pytest.raises(UserError, match=r"calibration.sequences.*method\.chunk"):
        run(tmp_path, *words, "model.load=stream")


def test_temporary_files_in_memory_are_refused(monkeypatch):
    class Mount(NamedTuple):
        device: str = "tmpfs"
        mountpoint: str = "/"
        fstype: str = "tmpfs"

    monkeypatch.setattr(on_disk.psutil, "disk_partitions", lambda all: [Mount()])
    with pytest.raises(UserError, match=r"model.load=stream: temporary files.*TMPDIR"):
        on_disk.check_room(1, "model.load=stream")
    monkeypatch.setattr(on_disk.psutil, "disk_partitions", lambda all: [])
    with pytest.raises(UserError, match=r"model.load=stream: needs .* GiB free"):
        on_disk.check_room(2**60, "model.load=stream")


def test_pages_that_left_memory_keep_what_was_written():
    tensor = on_disk.copied(torch.arange(100_000.0))
    tensor[7] = -1
    view = tensor[5:9]
    on_disk.drop()
    assert torch.equal(view, torch.tensor([5.0, 6.0, -1.0, 8.0]))
    assert on_disk.is_mapped(view) and not on_disk.is_mapped(view.clone())
    assert float(tensor[-1]) == 99_999


def test_a_module_that_was_moved_returns_to_its_place():
    linear = nn.Linear(8, 8)
    linear.weight.data = home = on_disk.copied(linear.weight)
    on_disk.assign(linear.weight, torch.ones(8, 8))
    assert linear.weight.data_ptr() == home.data_ptr() and bool((home == 1).all())


def test_mapped_tensors_of_one_file_share_no_storage():
    one, two = (on_disk.copied(torch.full((5, 3), value)) for value in (1.0, 2.0))
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
    assert one.untyped_storage().nbytes() == one.nbytes
    assert on_disk.is_mapped(one[1:]) and on_disk.is_mapped(two.T)
    on_disk.drop()
    assert float(one.sum()) == 15 and float(two.sum()) == 30
