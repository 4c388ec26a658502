"""Corpora: the same rows from files and from the hub, splits that do not overlap, clear errors."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.corpora import layout
from helpers.models import CONF
from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.data.catalog import CATALOG
from qexp.data.corpus import Corpus
from qexp.data.python_docs import LONG, PythonDocs
from qexp.data.standard import StandardCorpus
from qexp.data.synthetic import Synthetic

RAW = " \n = A page = \n \n Some words , with a line\u2028separator . \n Café @-@ \n \n"
ROWS = [
    "",
    " = A page = \n",
    "",
    " Some words , with a line\u2028separator . \n",
    " Café @-@ \n",
    "",
]
PTB = " no it was n't black monday \n but while the N <unk> \n"
OTHERS = {"local", "pileval", "from_run", "rte"}  # a file, a hub or a run folder that is not here
OTHERS |= {"images", "cifar10", "mnist", "imagenet"}  # no text
CHOICES = sorted({path.stem for path in (CONF / "data").glob("*.yaml")} - OTHERS)
SHARED = Path(os.environ.get("QEXP_DATA_DIR") or CONF.parents[1] / "shared" / "data")


def known(name: str, /, **fields: object) -> StandardCorpus:
    node = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    return instantiate(OmegaConf.merge(node, fields))


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("QEXP_DATA_DIR", raising=False)


def test_wikitext_rows_are_those_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "local" / "wikitext2").mkdir(parents=True)
    (tmp_path / "local" / "wikitext2" / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    config = CATALOG["wikitext2"].config
    hub = layout(
        tmp_path / "hub",
        config,
        {"test": [{"text": row} for row in ROWS]},
        {"test": f"{config}/test-00000-of-00001.parquet"},
    )
    local = known("wikitext2", source="local", folder=str(tmp_path / "local"))
    far = known("wikitext2", source="hub", hub=str(hub))
    assert local.documents("test") == far.documents("test") == ROWS
    assert local.text("test") == far.text("test") == RAW
    assert local.fingerprint("test") == far.fingerprint("test")
    assert len(local.files("test")) == 1 and far.files("test") == []


def test_ptb_rows_are_those_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "local" / "ptb").mkdir(parents=True)
    (tmp_path / "local" / "ptb" / "ptb.test.txt").write_text(PTB)
    rows = [{"sentence": line.strip()} for line in PTB.splitlines()]
    hub = layout(
        tmp_path / "hub", None, {"test": rows}, {"test": "penn_treebank/test/0000.parquet"}
    )
    local = known("ptb", source="local", folder=str(tmp_path / "local"))
    far = known("ptb", source="hub", hub=str(hub))
    assert local.documents("test") == far.documents("test") == [row["sentence"] for row in rows]
    assert local.text("test") == far.text("test") == PTB


def test_c4_reads_one_shard_of_the_hub(tmp_path: Path) -> None:
    records = [{"text": f"document {i}", "url": "u"} for i in range(5)]
    where = {split: CATALOG["c4"].parts[split].shard for split in ("train", "validation")}
    hub = layout(tmp_path / "hub", None, {"train": records[:2], "validation": records[2:]}, where)
    corpus = known("c4", source="hub", hub=str(hub))
    assert corpus.documents("validation") == ["document 2", "document 3", "document 4"]
    assert corpus.documents("train") == ["document 0", "document 1"]


@pytest.mark.parametrize("name", ["openwebtext", "lambada", "cbt", "tinystories"])
def test_single_files_are_divided_alike_from_files_and_hub(name: str, tmp_path: Path) -> None:
    texts = [f"Document {i} has a sentence." for i in range(20)]
    facts = CATALOG[name]
    part = facts.parts["train"]
    assert part.local is not None
    path = tmp_path / "local" / part.local
    path.parent.mkdir(parents=True)
    field = "content" if name == "cbt" else "text"
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif name == "cbt":
        path.write_text("".join(f"_BOOK_TITLE_ : {i}\n{text}" for i, text in enumerate(texts)))
    else:
        path.write_text("\n<|endoftext|>\n".join(texts))
    local = known(name, source="local", folder=str(tmp_path / "local"))
    calibration, evaluation = (
        local.documents(split) for split in (local.calibration_split, local.evaluation_split)
    )
    assert calibration + evaluation == texts
    if name == "tinystories":  # its hub has a validation split of its own
        return
    rows = {part.hub: [{field: text} for text in texts]}
    hub = layout(tmp_path / "hub", facts.config or "default", rows, {part.hub: "a/0.parquet"})
    far = known(name, source="hub", hub=str(hub))
    assert far.documents(local.calibration_split) == calibration
    assert far.documents(local.evaluation_split) == evaluation


def test_auto_prefers_files_and_says_where_a_missing_one_goes(tmp_path: Path) -> None:
    corpus = known("wikitext2", folder=str(tmp_path), hub=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"wiki\.train\.raw.*wikitext2_tokens") as caught:
        corpus.documents("train")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no split 'dev'"):
        corpus.documents("dev")
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.train.raw").write_text(RAW, encoding="utf-8")
    assert corpus.documents("train") == ROWS


@pytest.mark.parametrize(
    ("fields", "said"), [({"source": "web"}, "data.source"), ({"name": "enwik8"}, "data.name")]
)
def test_wrong_fields_are_named(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        known("wikitext2", **fields)


def test_python_docs_share_no_long_paragraph() -> None:
    corpus = PythonDocs()
    halves = [corpus.documents(split) for split in ("train", "test")]
    long = [{p for text in half for p in text.split("\n\n") if len(p) > LONG} for half in halves]
    assert not long[0] & long[1]
    sizes = [sum(map(len, half)) for half in halves]
    assert min(sizes) > 100_000 and max(sizes) < 1.2 * min(sizes)
    assert corpus.fingerprint("test") == PythonDocs().fingerprint("test")


def test_synthetic_is_seeded_and_splits_differ() -> None:
    texts = [Synthetic(seed).text(split) for seed in (0, 1) for split in ("train", "test")]
    assert len(set(texts)) == 4
    assert Synthetic(0).text("train") == texts[0]
    ids = Synthetic().ids("train", 50, 1000)
    assert ids.min() >= 0 and ids.max() < 50
    assert not torch.equal(ids, Synthetic().ids("test", 50, 1000))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_gives_text_that_does_not_overlap(choice: str) -> None:
    node = OmegaConf.create(
        {"seed": 0, "data": OmegaConf.load(CONF / "data" / f"{choice}.yaml")}
    ).data
    corpus = instantiate(node)
    assert isinstance(corpus, Corpus) and corpus.name == choice
    if isinstance(corpus, StandardCorpus):
        corpus = known(choice, folder=str(SHARED))
        if not corpus.files(corpus.evaluation_split):
            pytest.skip("no local files")
    calibration, evaluation = (
        [row for row in corpus.documents(split) if len(row) > 200]
        for split in (corpus.calibration_split, corpus.evaluation_split)
    )
    assert calibration and evaluation
    assert not set(calibration) & set(evaluation)


def test_wikitext_files_are_reproduced_byte_for_byte() -> None:
    path = SHARED / "wikitext2" / "wiki.test.raw"
    if not path.is_file():
        pytest.skip("no local files")
    corpus = known("wikitext2", folder=str(SHARED))
    assert corpus.text("test") == path.read_bytes().decode()
    assert len(corpus.documents("test")) == 4358
