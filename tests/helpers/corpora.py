"""Local folders laid out like repositories of the hub."""

import gzip
import json
from pathlib import Path

import pytest


def layout(folder: Path, config: str | None, rows: dict[str, list[dict]], where: dict) -> Path:
    """A local folder like a repository of the hub: parquet or json files, and a card."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    for split, records in rows.items():
        path = folder / where[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            lines = "".join(json.dumps(record) + "\n" for record in records)
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
    if config:
        files = [{"split": split, "path": where[split]} for split in rows]
        card = {"configs": [{"config_name": config, "data_files": files}]}
        (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder
