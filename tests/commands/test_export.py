"""`qexp export` as a command."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from qexp import cli
from qexp.commands import export_table
from qexp.models import target_library

VERSIONS = {"transformers": "5"}


def version(name: str) -> str:
    if name not in VERSIONS:
        raise PackageNotFoundError(name)
    return VERSIONS[name]


SMALL = [
    *("data=synthetic", "eval.held_out.length=64", "eval.held_out.limit=4"),
    *("model=tiny_llama", "method=rtn", "calibration=none", "weight.group_size=32"),
    *("logger=none", "hydra/job_logging=none"),
]


def test_a_run_leaves_and_its_number_is_measured_from_what_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qexp", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0

    assert call(*SMALL) == 0
    [run] = map(str, Path("outputs").iterdir())
    capsys.readouterr()
    assert call("export", run, "format=") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines][:2] == ["compressed_tensors", "gptq"]
    assert call("export", run, "made", "format=compressed_tensors", "verify=protocol") == 0
    out = capsys.readouterr().out
    facts = json.loads(Path("made/qexp.json").read_text())
    [(name, value)] = facts["measured"].items()
    assert value == facts["metrics"][name] and f"{name}: {value:.6g} from the export" in out
    assert f"| {name} | {value:.6g} | {value:.6g} |" in Path("made/README.md").read_text()
    assert call("export", run, "made.gguf", "format=gguf", "verify=protocol") == 0
    assert f"{value:.6g} from the export, {value:.6g} in the run" in capsys.readouterr().out
    for words, said in (
        (("made",), "already exists"),
        (("a", "format=gguf4"), "format=gguf4 is unknown"),
        (("a", "bits=4"), "bits=4: is no key"),
        (("a", "b"), "one run and one OUT"),
        (("a", "format="), "has no value"),
    ):
        assert call("export", run, *words) == 1
        assert said in capsys.readouterr().err
    table = ("export-table", run, "--to", "all", "--formats")
    monkeypatch.setattr(target_library, "version", version)
    assert call(*table, "float,gptq") == 0
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in Path("all").glob("*/*.safetensors")) / 1e6
    cells = [cell.strip() for cell in out.splitlines()[2].strip("|").split("|")]
    number = f"{value:.4f}"
    assert cells == [
        *(Path(run).name, name.removesuffix("/ppl"), number),
        *(number, "+0.0e+00", f"{size:.1f}", "", "", ""),
    ]
    assert "float: transformers 5; largest KL" in out
    assert "gptq: verify=target: gptqmodel is not installed" in out
    monkeypatch.setattr(export_table, "export", None)  # what is there is used again
    assert call(*table, "float") == 0
    assert capsys.readouterr().out.splitlines()[2][:40] == out.splitlines()[2][:40]
    assert call(*table, "float", "--windows", "1") == 1
    assert "already exists" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    assert call("export-table", run, "--to", "one", "--formats", "float", "--windows", "1") == 0
    first = capsys.readouterr().out.splitlines()[2].split("|")
    assert first[3] == first[4] and first[3].strip() != number
    assert call(*table, "gguf4") == 1
    assert "--formats gguf4: is unknown" in capsys.readouterr().err
    assert call("export", "nowhere", "a") == 1
    assert not Path("a").exists() and not list(Path().glob(".made*"))
