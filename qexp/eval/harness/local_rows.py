"""Local files of harness tasks, and their conversion to the hub's row format.

The keys of the table are the harness's data set names. Paths are relative to QEXP_DATA_DIR.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qexp.data.readers import read_records, read_text
from qexp.eval.wikitext import pages

Row = dict[str, Any]


def _same(row: Row) -> Row:
    return row


@dataclass(frozen=True)
class Facts:
    """Files by split (`{}` is replaced by the data set's name), and the conversion of a row.

    `by`: a field of the file that selects rows by the data set's name, where the hub has a
    separate data set for each value.
    """

    files: dict[str, str]
    row: Callable[[Row], Row] = _same
    by: str | None = None


def _arc(row: Row) -> Row:
    """Labels the choices with letters if the file has no labels: prompts never show them."""
    if "answerKey" in row:
        return row
    labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    answer = labels[row["gold"]]
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": answer}


def _hellaswag(row: Row) -> Row:
    """Splits `query` ("activity: context") into the hub's fields.

    If the context ends inside a sentence, that unfinished sentence is the hub's ctx_b.
    """
    if "ctx_a" in row:
        return row
    activity, _, context = row["query"].partition(": ")
    whole = re.fullmatch(r"(.*[.?!][\"')]*) +(.*[^.?!\"')])", context, re.DOTALL)
    first, second = whole.groups() if whole else (context, "")
    contexts = {"ctx_a": first, "ctx_b": second, "ctx": context}
    label = str(row["label"])
    return {**contexts, "activity_label": activity, "endings": row["endings"], "label": label}


def _boolq(row: Row) -> Row:
    return {
        "question": row["question"],
        "passage": row["passage"],
        "label": int(row["answer"] if "answer" in row else row["label"]),
    }


def _lambada(row: Row) -> Row:
    return row if "text" in row else {"text": f"{row['context']} {row['continuation']}"}


def _truthfulqa(row: Row) -> Row:
    """Converts the published table's columns; answers are split as in the hub's script."""
    if "question" in row:
        return row
    plain = {key: row[key.title()] for key in ("type", "category", "question", "source")}
    lists = {
        f"{kind}_answers": [
            text.strip() for text in row[f"{kind.title()} Answers"].strip(" ;").split(";")
        ]
        for kind in ("correct", "incorrect")
    }
    return {**plain, "best_answer": row["Best Answer"], **lists}


def _files(pattern: str, *splits: str) -> dict[str, str]:
    return {split: f"{pattern}_{split}.jsonl" for split in splits}


_TWO = ("train", "validation")


_GSM8K = {split: f"tasks/gsm8k/{split}.jsonl" for split in ("train", "test")}

FACTS: dict[tuple[str, str | None], Facts] = {
    ("allenai/winogrande", "winogrande_xl"): Facts(_files("tasks/winogrande/winogrande_xl", *_TWO)),
    ("baber/piqa", None): Facts(_files("tasks/piqa/piqa", *_TWO)),
    ("Rowan/hellaswag", None): Facts(
        {"train": "hellaswag/hellaswag_train.jsonl", "validation": "hellaswag/hellaswag_val.jsonl"},
        _hellaswag,
    ),
    ("allenai/ai2_arc", "ARC-Easy"): Facts(_files("tasks/arc/arc_easy", *_TWO, "test"), _arc),
    ("allenai/ai2_arc", "ARC-Challenge"): Facts(
        _files("tasks/arc/arc_challenge", *_TWO, "test"), _arc
    ),
    # Google's rows: without the title that the hub's super_glue adds before a passage
    ("aps/super_glue", "boolq"): Facts(_files("tasks/boolq/boolq", *_TWO), _boolq),
    ("cais/mmlu", None): Facts(
        _files("tasks/mmlu/mmlu", "dev", "validation", "test"), by="subject"
    ),
    ("openai/gsm8k", "main"): Facts(_GSM8K),
    ("EleutherAI/lambada_openai", "default"): Facts(
        {"test": "lambada/lambada_openai_test.jsonl"}, _lambada
    ),
    ("nyu-mll/blimp", None): Facts({"train": "tasks/blimp/{}.jsonl"}),
    ("tau/commonsense_qa", None): Facts(_files("tasks/commonsenseqa/csqa", *_TWO)),
    ("lighteval/siqa", None): Facts(_files("tasks/socialiqa/socialiqa", *_TWO)),
    ("google-research-datasets/nq_open", None): Facts(_files("tasks/nq_open/nq_open", *_TWO)),
    # This table is for truthfulqa_gen. The choices of truthfulqa_mc1 and mc2 are in another file
    # (mc_task.json) and cannot be derived from the table.
    ("truthfulqa/truthful_qa", "generation"): Facts(
        {"validation": "tasks/truthfulqa/TruthfulQA.csv"}, _truthfulqa
    ),
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): Facts(
        {
            "train": "wikitext2/wiki.train.raw",
            "validation": "wikitext2/wiki.valid.raw",
            "test": "wikitext2/wiki.test.raw",
        }
    ),
}


def find(path: str | None, name: str | None) -> Facts | None:
    """The table's entry for a data set of the harness, if there is one."""
    return FACTS.get((path or "", name)) or FACTS.get((path or "", None))


def local(facts: Facts, name: str | None, where: Path) -> Iterator[tuple[str, Path]]:
    """The splits whose files exist."""
    for split, pattern in facts.files.items():
        if (path := where / pattern.format(name)).is_file():
            yield split, path


def rows(facts: Facts, name: str | None, path: Path) -> list[Row]:
    """The rows of one file in the hub's format."""
    content = _read(path, path.stat().st_mtime_ns)
    if facts.by is not None:
        content = [row for row in content if row[facts.by] == name]
    return [facts.row(row) for row in content]


@lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int) -> list[Row]:
    if path.suffix == ".raw":
        return [{"page": page} for page in pages(read_text(path))]
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(read_text(path))))
    return read_records(path)
