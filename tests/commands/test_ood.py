"""In and out of distribution: every arm runs on tiny models, and the table says what they lost."""

import csv
import math
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf, open_dict

from qexp import pipeline
from qexp.cli import command
from qexp.commands import ood
from qexp.common.errors import UserError
from qexp.runs.finished import load

pytestmark = pytest.mark.usefixtures("configured")


CORPORA = {"wikitext2": "synthetic", "c4": "python_docs", "openwebtext": "python_docs"}
CORPORA |= {"lambada": "python_docs", "cbt": "synthetic"}
TINY = (
    "model=tiny_gpt2",
    "model.seed=0",
    "data.seed=0",
    "eval.wikitext2.corpus.seed=0",
    "eval.cbt.corpus.seed=0",
    "data=synthetic",
    "calibration.sequences=4",
    "calibration.length=32",
    "trainer=smoke",
    "progress=false",
    *(f"data@eval.{name}.corpus={corpus}" for name, corpus in CORPORA.items()),
    *(f"eval.{name}.{key}" for name in CORPORA for key in ("length=32", "limit=3")),
)
ARMS = {
    "setting": ("method=none", "activation=none"),
    "float": ("method.train.share=0.1",),
    "ptq": ("transform=smooth",),
    "mse": (),
    "qat": ("method.train.share=0.1", "method/trained=ranges"),
    "phase1": ("transform.steps=2", "transform.batch=2"),
    "phases": ("transform.steps=2", "transform.batch=2", "method.training.train.share=0.1"),
}
ID, OOD = "synthetic_raw_32x3/ppl", "python_docs_raw_32x3/ppl"


def run(folder: Path, experiment: str, *overrides: str) -> dict[str, float]:
    """As the command would leave it."""
    words = [f"experiment=quadapter_{experiment}", *TINY, *ARMS[experiment], *overrides]
    cfg = compose("config", words, return_hydra_config=True)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    kept = folder / ".hydra"
    kept.mkdir(parents=True)
    OmegaConf.save(cfg, kept / "config.yaml")
    OmegaConf.save({"hydra": {"runtime": {"choices": choices}}}, kept / "hydra.yaml")
    OmegaConf.save(words, kept / "overrides.yaml")
    return pipeline.run(cfg, folder)


@pytest.mark.slow
def test_every_arm_is_a_row_of_ratios(tmp_path, capsys):
    found = {arm: run(tmp_path / arm, arm) for arm in ARMS}
    found["qat 1"] = run(tmp_path / "qat 1", "qat", "seed=1")
    assert command("ood", [str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "ood.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ARMS)
    plain = found["setting"]

    def of(**labels: str) -> dict[str, str]:
        names = {key.replace("_", " "): label for key, label in labels.items()}
        [row] = [row for row in rows if all(row[key] == label for key, label in names.items())]
        return row

    tuned = of(method="finetune")
    assert float(tuned["F-ID/ratio"]) == pytest.approx(found["float"][ID] / plain[ID])
    assert float(tuned["F-OOD/ratio"]) == pytest.approx(found["float"][OOD] / plain[OOD])
    assert (tuned["width"], tuned["trained on"]) == ("float", "10 %")
    qat = of(method="qat")
    ratios = [found[arm][ID] / plain[ID] for arm in ("qat", "qat 1")]
    assert float(qat["F-ID/ratio"]) == pytest.approx(sum(ratios) / 2)
    assert float(qat["F-ID/ratio deviation"]) == pytest.approx(abs(ratios[0] - ratios[1]) / 2**0.5)
    assert of(transform="quadapter", method="rtn")["trained on"] == ""
    assert of(transform="quadapter", method="quadapter")["trained on"] == "10 %"
    assert of(transform="smooth")["width"] == "W8A8" and of(ranges="mse")["method"] == "rtn"
    assert "F-OOD: geometric mean" in capsys.readouterr().out


def test_the_mean_over_other_corpora_is_geometric(tmp_path, monkeypatch):
    run(tmp_path, "setting")
    float_ = load(tmp_path)
    metrics = {ID: 10.0, OOD: 20.0, "third/ppl": 40.0}
    protocols = float_.provenance["protocols"]
    protocols["third"] = {"digest": "0", "definition": {"corpus": {"name": "third"}}}
    config = float_.config | {"method": {"_target_": "other"}}
    changed = {ID: 30.0, OOD: 40.0, "third/ppl": 320.0}
    values = vars(float_) | {"metrics": metrics}
    plain = type(float_)(**values)
    other = type(float_)(
        **values
        | {"metrics": changed, "config": config, "choices": float_.choices | {"method": "other"}}
    )
    ratios = ood.measured([plain, other])[1].metrics
    assert ratios["F-ID/ratio"] == pytest.approx(3)
    assert ratios["F-OOD/ratio"] == pytest.approx(math.sqrt(2 * 8))
    monkeypatch.setitem(ood.FORMS, "third", "synthetic")  # corpus i in another form
    both = ood.measured([plain, other])[1].metrics
    assert both["F-ID/ratio"] == pytest.approx(math.sqrt(3 * 8))
    assert both["F-OOD/ratio"] == pytest.approx(2)
    with pytest.raises(UserError, match="run the float model"):
        ood.measured([other])
