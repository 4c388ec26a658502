"""Where the rows of harness tasks are as local files, and what turns them into the hub's rows.

One table, keyed as the harness names its data. Paths are below the folder QEXP_DATA_DIR.
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
    """Files by split (`{}` is the data set's name, as in blimp), and the hub's row of each row.

    `by`: a field that the file has and the hub does not, because there each of its values is a data
    set of its own.
    """

    files: dict[str, str]
    row: Callable[[Row], Row] = _same
    by: str | None = None


def _arc(row: Row) -> Row:
    """Where the labels of the choices are lost, they are letters: prompts never show them."""
    if "answerKey" in row:
        return row
    labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    answer = labels[row["gold"]]
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": answer}


def _hellaswag(row: Row) -> Row:
    """`query` is "activity: context"; a context that does not end a sentence goes on with the
    words that the ending completes (the hub's ctx_b)."""
    if "ctx_a" in row:
        return row
    activity, _, context = row["query"].partition(": ")
    whole = re.fullmatch(r"(.*[.?!][\"')]*) +(.*[^.?!\"')])", context, re.DOTALL)
    first, second = whole.groups() if whole else (context, "")
    ends = {"ctx_a": first, "ctx_b": second, "ctx": context}
    label = str(row["label"])
    return {**ends, "activity_label": activity, "endings": row["endings"], "label": label}


def _boolq(row: Row) -> Row:
    return {
        "question": row["question"],
        "passage": row["passage"],
        "label": int(row["answer"] if "answer" in row else row["label"]),
    }


def _lambada(row: Row) -> Row:
    return row if "text" in row else {"text": f"{row['context']} {row['continuation']}"}


def _truthfulqa(row: Row) -> Row:
    """The published table's columns, answers parted as the hub's script does."""
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
    # the file has Google's rows: without the title that the hub's super_glue puts before a passage
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
    # The table of questions is truthfulqa_gen's. The choices of truthfulqa_mc1 and mc2 are a file
    # of their own (mc_task.json): which of the answers, in what words, the table does not tell.
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
    """The facts of a data set of the harness, if it has any here."""
    return FACTS.get((path or "", name)) or FACTS.get((path or "", None))


def local(facts: Facts, name: str | None, where: Path) -> Iterator[tuple[str, Path]]:
    """The splits whose files are there."""
    for split, pattern in facts.files.items():
        if (path := where / pattern.format(name)).is_file():
            yield split, path


def rows(facts: Facts, name: str | None, path: Path) -> list[Row]:
    """The rows of one file, as the hub has them."""
    found = _read(path, path.stat().st_mtime_ns)
    if facts.by is not None:
        found = [row for row in found if row[facts.by] == name]
    return [facts.row(row) for row in found]


@lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int) -> list[Row]:
    if path.suffix == ".raw":
        return [{"page": page} for page in pages(read_text(path))]
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(read_text(path))))
    return read_records(path)
