"""Labelled rows: texts and images from files, in every layout, as batches that classifiers take."""

import gzip
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.corpora import layout
from helpers.models import CONF, data_dir, tiny
from omegaconf import OmegaConf
from PIL import Image

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.data.calibration import Calibration
from qexp.data.images import Images
from qexp.data.standard import StandardCorpus
from qexp.data.synthetic import Synthetic
from qexp.eval.accuracy import Accuracy
from qexp.task import TASKS, Task, trimmed
from qexp.training.augmentation import Augmented


def classifier(kind: str = "bert", **fields: object) -> Task:
    if kind == "vit":
        return TASKS["image_classification"](*tiny("vit", **fields)[:2]).eval()
    loaded = tiny("bert", objective="sequence_classification", **fields)
    return TASKS["sequence_classification"](*loaded[:2]).eval()


def sst2(folder: Path) -> StandardCorpus:
    rows = 'sentence\tlabel\na "quoted film \t1\ndull \t0\nlong , long , and dull \t0\n'
    for name in ("train_full", "dev"):
        path = folder / "glue" / "sst2_tsv" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows)
    return instantiate(
        OmegaConf.merge(OmegaConf.load(CONF / "data/sst2.yaml"), {"folder": str(folder)})
    )


def test_sentences_with_their_labels(tmp_path):
    corpus, task = sst2(tmp_path), classifier()
    assert [tuple(row) for row in corpus.examples("train")] == [
        ('a "quoted film', None, 1),
        ("dull", None, 0),
        ("long , long , and dull", None, 0),
    ]
    [batch] = Calibration(corpus, sequences=2, length=10)(task)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == (2, 10)  # the first is cut, the second padded
    assert batch["attention_mask"].sum(1).tolist() == [10, 4] and "labels" in batch
    before = corpus.fingerprint("train")
    path = tmp_path / "glue/sst2_tsv/train_full.tsv"
    path.write_text(path.read_text().replace("\t1", "\t0"))
    assert corpus.fingerprint("train") != before


def test_pairs_stand_in_one_sequence(tmp_path):
    path = tmp_path / "glue" / "glue_rte_validation.jsonl"
    path.parent.mkdir()
    path.write_text('{"sentence1": "It rains.", "sentence2": "Wet.", "label": 0, "idx": 0}\n')
    node = OmegaConf.merge(OmegaConf.load(CONF / "data/rte.yaml"), {"folder": str(tmp_path)})
    [batch] = Calibration(instantiate(node), split="validation", sequences=1)(classifier())
    assert bytes(batch["input_ids"][0].tolist()) and batch["input_ids"].shape == (1, 13)


def test_padding_changes_no_loss_and_can_be_cut_off(tmp_path):
    task = classifier()
    [batch] = Calibration(sst2(tmp_path), sequences=3, length=64)(task)
    row = {key: value[1:2] for key, value in batch.items()}
    short = trimmed(row)
    assert short["input_ids"].shape == (1, 4) and short["labels"].shape == (1,)
    torch.testing.assert_close(task.loss(short), task.loss(row))
    assert trimmed({"input_ids": torch.ones(1, 3)}).keys() == {"input_ids"}


def picture(label: int, at: int) -> Image.Image:
    pixels = np.full((32, 32, 3), 20 * label, np.uint8)
    pixels[..., 1] = at
    return Image.fromarray(pixels)


def tree(folder: Path) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog", "eel")):
            for at in range(2):
                path = folder / split / name / f"{at}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(label, at).save(path)
    return folder


def archive(folder: Path) -> Path:
    made = tree(folder / "tree")
    with tarfile.open(folder / "images.tar.gz", "w:gz") as file:
        file.add(made, "images")
    return folder / "images.tar.gz"


@pytest.mark.parametrize("layout", [tree, archive])
def test_images_by_split_and_class(tmp_path, layout):
    corpus = Images("mine", "train", "test", str(layout(tmp_path)))
    assert corpus.total("train") == 6
    pixels, labels = corpus.images("test", (3, 32, 32), 10, [0, 5])
    assert labels.tolist() == [0, 2]
    torch.testing.assert_close(pixels[1, :, 0, 0], torch.tensor([40.0, 1, 40]) / 127.5 - 1)
    assert corpus.files("test") and corpus.fingerprint("test")
    assert corpus.images("test", (1, 8, 8), 10, [1])[0].shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="no split 'val'"):
        corpus.total("val")


def test_idx_files(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for name, values in (("images-idx3", images), ("labels-idx1", np.array([7, 3], np.uint8))):
        head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(
            f">{values.ndim}I", *values.shape
        )
        path = tmp_path / f"t10k-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(head + values.tobytes()))
    corpus = Images("digits", "train", "test", str(tmp_path), mean=0.0, std=1.0)
    pixels, labels = corpus.images("test", (1, 28, 28), 10, [1, 0])
    assert labels.tolist() == [3, 7]
    torch.testing.assert_close(pixels[1, 0], torch.from_numpy(images[0]) / 255)
    path.write_bytes(b"no idx file")
    with pytest.raises(UserError, match="is not an idx file"):
        corpus.total("test")


def test_rows_of_the_hub_are_those_of_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = str(tree(tmp_path / "tree"))
    near = Images("mine", "train", "test", folder)
    far = Images("mine", "train", "test", hub=folder)
    assert near.total("test") == far.total("test") == 6 and far.files("test") == []
    for one, other in zip(
        *(c.images("test", (3, 32, 32), 3, [4, 1]) for c in (near, far)), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"data\.image.*image, label"):
        Images("mine", "train", "test", hub=folder, image="img").total("train")
    rows = [{"sentence": text, "label": at, "idx": 0} for at, text in enumerate(("dull ", "fine"))]
    hub = layout(tmp_path / "hub", "sst2", {"train": rows}, {"train": "sst2/train-0.parquet"})
    corpus = StandardCorpus("sst2", "train", "validation", source="hub", hub=str(hub))
    assert [tuple(row) for row in corpus.examples("train")] == [
        ("dull", None, 0),
        ("fine", None, 1),
    ]


def test_images_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"data\.path.*does not exist"):
        Images("mine", "train", "test", str(tmp_path / "gone")).total("train")
    with pytest.raises(UserError, match="no images at train/CLASS"):
        Images("mine", "train", "test", str(tmp_path)).total("train")
    (tmp_path / "broken.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match="tar archive"):
        Images("mine", "train", "test", str(tmp_path / "broken.tar")).total("train")
    with pytest.raises(UserError, match="holds images"):
        Images("mine", "train", "test", str(tmp_path)).text("train")


def test_which_rows_the_seed_draws():
    corpus, task = Synthetic(count=20), classifier("vit")
    some, same, other, every = (
        Calibration(corpus, sampling="shuffled", seed=seed, share=share)(task)[0]["labels"]
        for seed, share in ((0, 0.5), (0, 0.5), (1, 0.5), (0, 1.0))
    )
    assert torch.equal(some, same) and not torch.equal(some, other)
    assert len(some) == 10 and len(every) == 20 and torch.equal(every[:10], some)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_accuracy_is_the_share_of_rows_that_are_right(kind):
    task = classifier(kind)
    recipe = Calibration(Synthetic(count=24), sampling="shuffled", share=1.0)
    [batch] = recipe(task)
    few = {key: value[:24] for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        right = (task.model(**few).logits.argmax(-1) == batch["labels"]).double()
    one, other = (Accuracy("a", recipe, rows)(task) for rows in (24, 7))
    assert one == other and one["rows"] == 24
    assert one["acc"] == pytest.approx(float(right.mean()))
    assert one["acc_stderr"] == pytest.approx(float(right.std() / 24**0.5))


def test_accuracy_needs_classes():
    task = TASKS["causal_lm"](*tiny("llama")[:2])
    with pytest.raises(UserError, match="needs a classifier"):
        Accuracy("a", Calibration(Synthetic()))(task)
    with pytest.raises(UserError, match="has the label 1, but the model has 1 classes"):
        Calibration(Synthetic())(classifier(sizes={"num_labels": 1}))


@pytest.mark.skipif(data_dir() is None, reason="needs real data")
def test_the_real_sets(monkeypatch):
    monkeypatch.setenv("QEXP_DATA_DIR", str(data_dir()))
    sst2, cifar, mnist = (
        instantiate(OmegaConf.load(CONF / "data" / f"{name}.yaml"))
        if name == "sst2"
        else _images(name)
        for name in ("sst2", "cifar10", "mnist")
    )
    assert (len(sst2.examples("train")), len(sst2.examples("validation"))) == (67349, 872)
    assert cifar.total("test") == mnist.total("test") == 10000
    pixels, labels = cifar.images("test", (3, 32, 32), 10, [0, 9999])
    assert labels.tolist() == [0, 9] and pixels.abs().max() <= 1
    assert mnist.images("test", (1, 28, 28), 10, [0])[1].tolist() == [7]


def _images(name: str) -> Images:
    whole = OmegaConf.load(CONF / "data" / "images.yaml")
    own = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    del own.defaults
    return instantiate(OmegaConf.merge(whole, own))


def test_images_are_shifted_and_mirrored_in_training_alone():
    task, [batch] = (
        classifier("vit"),
        Calibration(Synthetic(count=8), sequences=8)(classifier("vit")),
    )
    objective, images = Augmented(shift=2), torch.arange(2.0 * 3 * 6 * 5).reshape(2, 3, 6, 5)
    torch.testing.assert_close(objective(task, None, batch), task.loss(batch))
    task.train()
    assert objective(task, None, batch) != task.loss(batch)
    assert torch.equal(Augmented(0, flip=False).change(images), images)
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        for image, changed in zip(images, Augmented(shift=1).change(images), strict=True):
            padded = torch.nn.functional.pad(image, [1] * 4, value=0.0)
            crops = {
                (down, right, mirrored): crop.flip(2) if mirrored else crop
                for down in range(3)
                for right in range(3)
                for mirrored in (False, True)
                for crop in [padded[:, down : down + 6, right : right + 5]]
            }
            [which] = [key for key, crop in crops.items() if torch.equal(crop, changed)]
            seen.add(which)
    assert len(seen) == 18
