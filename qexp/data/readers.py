"""Readers of text files and record files, whose errors name the file."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from qexp.common.errors import UserError


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, also gzipped, with \\n as newline."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read as UTF-8 text ({reason})") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .parquet, .tsv, .jsonl or .json file (the last two also gzipped)."""
    if path.suffix == ".parquet":
        return _parquet(path)
    content = read_text(path)
    if path.suffix == ".tsv":  # column names in the first line, no quoting
        lines = content.removesuffix("\n").split("\n")
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        if content.lstrip().startswith("["):
            records = json.loads(content)
        else:
            records = [json.loads(line) for line in content.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON, line {error.lineno} ({error.msg})") from error
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: every record must be a JSON object with a text field")
    return records


def _parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet  # slow to import, and few texts need it

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error
