"""Catalog of standard corpora: their place on the hub, and their files below QEXP_DATA_DIR."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qexp.data.corpus import Example

WHOLE = (0.0, 1.0)
FIRST, LAST = (0.0, 0.5), (0.5, 1.0)


@dataclass(frozen=True)
class SplitInfo:
    """One split: a local file, a split or shard of the hub, and the fraction taken of each."""

    local: str | None
    hub: str
    shard: str | None = None  # a file of the hub's repository, where the whole split is too large
    local_share: tuple[float, float] = WHOLE
    hub_share: tuple[float, float] = WHOLE
    instead: str = ""  # an alternative, where the local file is often missing


@dataclass(frozen=True)
class CorpusInfo:
    """One corpus. revision: a commit, or a branch. record: the text of a hub record. rows: the
    documents of a local file. text: the running text of rows. example: the text and label of a
    labelled record."""

    hub: str
    parts: dict[str, SplitInfo]
    config: str | None = None
    revision: str = "main"
    record: Callable[[dict[str, Any]], str] = field(default=lambda record: record["text"])
    rows: Callable[[str], list[str]] = field(default=lambda text: [text])
    text: Callable[[list[str]], str] = "\n\n".join
    example: Callable[[dict[str, Any]], Example] | None = None
    same: str | None = None  # the corpus whose text it is, in another form
    take: int | None = None  # the first documents of a hub split too large to fetch


def _lines(text: str) -> list[str]:
    """Lines with their newline. Not splitlines(): it also cuts at separators inside a line."""
    return [line + "\n" for line in text.removesuffix("\n").split("\n")] if text else []


def _wiki_rows(text: str) -> list[str]:
    return [line if line.strip() else "" for line in _lines(text)]


def _wiki_text(rows: list[str]) -> str:
    return "".join(row or " \n" for row in rows)  # blank lines of the files contain one space


def _ptb_rows(text: str) -> list[str]:
    return [line.strip() for line in _lines(text)]


def _ptb_text(rows: list[str]) -> str:
    return "".join(f" {row} \n" for row in rows)


def _stories(text: str) -> list[str]:
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


def _books(text: str) -> list[str]:
    """Each book without its title line."""
    books = text.split("_BOOK_TITLE_ : ")[1:]
    return [book.partition("\n")[2] for book in books]


def _wikitext(pattern: str, instead: str = "") -> dict[str, SplitInfo]:
    return {
        "train": SplitInfo(pattern.format("train"), "train", instead=instead),
        "validation": SplitInfo(pattern.format("valid"), "validation"),
        "test": SplitInfo(pattern.format("test"), "test"),
        # halves of the validation text, for searches: a method sees one, settings are chosen on the
        # other
        "calibrate": SplitInfo(pattern.format("valid"), "validation", None, FIRST, FIRST),
        "choose": SplitInfo(pattern.format("valid"), "validation", None, LAST, LAST),
    }


def _halves(local: str | None, hub: str) -> dict[str, SplitInfo]:
    """A corpus of one file: the first half for calibration, the second for evaluation."""
    return {
        "train": SplitInfo(local, hub, local_share=FIRST, hub_share=FIRST),
        "test": SplitInfo(local, hub, local_share=LAST, hub_share=LAST),
    }


def _sentence(record: dict[str, Any]) -> Example:
    return Example(record["sentence"].strip(), None, int(record["label"]))


def _pair(record: dict[str, Any]) -> Example:
    return Example(record["sentence1"], record["sentence2"], int(record["label"]))


WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
C4_COMMIT = "607bd4c8450a42878aa9ddc051a65a055450ef87"
C4_SAMPLE = "c4/c4-sample.00000-of-00001.json.gz"

CATALOG: dict[str, CorpusInfo] = {
    "wikitext2": CorpusInfo(
        "Salesforce/wikitext",
        _wikitext(
            "wikitext2/wiki.{}.raw",
            "data=wikitext2_tokens has a train split (wikitext2/wiki.train.tokens)",
        ),
        "wikitext-2-raw-v1",
        WIKITEXT_COMMIT,
        rows=_wiki_rows,
        text=_wiki_text,
    ),
    "wikitext2_tokens": CorpusInfo(  # rare words are <unk>
        "Salesforce/wikitext",
        _wikitext("wikitext2/wiki.{}.tokens"),
        "wikitext-2-v1",
        WIKITEXT_COMMIT,
        same="wikitext2",
        rows=_wiki_rows,
        text=_wiki_text,
    ),
    "ptb": CorpusInfo(
        "ptb-text-only/ptb_text_only",
        {
            "train": SplitInfo("ptb/ptb.train.txt", "train", "penn_treebank/train/*.parquet"),
            "validation": SplitInfo(
                "ptb/ptb.valid.txt", "validation", "penn_treebank/validation/*.parquet"
            ),
            "test": SplitInfo("ptb/ptb.test.txt", "test", "penn_treebank/test/*.parquet"),
        },
        revision="refs/convert/parquet",  # the repository itself is a script
        record=lambda record: record["sentence"],
        rows=_ptb_rows,
        text=_ptb_text,
    ),
    "c4": CorpusInfo(  # the local sample is one file: its halves replace the two shards
        "allenai/c4",
        {
            "train": SplitInfo(
                C4_SAMPLE, "train", "en/c4-train.00000-of-01024.json.gz", local_share=FIRST
            ),
            "validation": SplitInfo(
                C4_SAMPLE, "validation", "en/c4-validation.00000-of-00008.json.gz", local_share=LAST
            ),
        },
        revision=C4_COMMIT,
    ),
    "openwebtext": CorpusInfo(
        "Skylion007/openwebtext", _halves("openwebtext/owt_sample.jsonl", "train"), take=1000
    ),
    "lambada": CorpusInfo(
        "EleutherAI/lambada_openai",
        _halves("lambada/lambada_openai_test.jsonl", "test"),
        "default",
        record=lambda record: (
            record["text"] if "text" in record else f"{record['context']} {record['continuation']}"
        ),
    ),
    "cbt": CorpusInfo(
        "cam-cst/cbt",
        _halves("cbt/cbt_test.txt", "test"),
        "raw",
        record=lambda record: record["content"],
        rows=_books,
    ),
    # The local file is the beginning of the training text; its last tenth is held out.
    "tinystories": CorpusInfo(
        "roneneldan/TinyStories",
        {
            "train": SplitInfo(
                "tinystories/tinystories_sample_2MiB.txt", "train", None, (0.0, 0.9)
            ),
            "validation": SplitInfo(
                "tinystories/tinystories_sample_2MiB.txt", "validation", None, (0.9, 1.0)
            ),
        },
        rows=_stories,
        take=20000,
    ),
    "pileval": CorpusInfo(
        "mit-han-lab/pile-val-backup",
        {**_halves(None, "validation"), "validation": SplitInfo(None, "validation")},
    ),
    "sst2": CorpusInfo(  # the hub's test split has no labels
        "nyu-mll/glue",
        {
            "train": SplitInfo("glue/sst2_tsv/train_full.tsv", "train"),
            "validation": SplitInfo("glue/sst2_tsv/dev.tsv", "validation"),
            "test": SplitInfo("glue/sst2_tsv/test-labeled.tsv", "test"),
        },
        "sst2",
        record=lambda record: record["sentence"].strip(),
        example=_sentence,
    ),
    "rte": CorpusInfo(
        "nyu-mll/glue",
        {
            "train": SplitInfo("glue/glue_rte_train.jsonl", "train"),
            "validation": SplitInfo("glue/glue_rte_validation.jsonl", "validation"),
        },
        "rte",
        record=lambda record: f"{record['sentence1']} {record['sentence2']}",
        example=_pair,
    ),
}
