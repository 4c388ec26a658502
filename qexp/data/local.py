"""Corpus of one text file that the user provides."""

from dataclasses import dataclass
from pathlib import Path

from qexp.common.errors import UserError
from qexp.data.corpus import Corpus, check_split, share
from qexp.data.readers import read_records, read_text

RECORDS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Local(Corpus):
    """One file, divided without overlap into calibration and evaluation text.

    path: a .jsonl, .json (either also .gz) or .parquet file whose records have a text in `field`,
    or else plain UTF-8 text. The first `calibration_share` of it is the split `train`, the rest
    `test`. Records are not split; plain text is split by characters at the end of a line, or of a
    word where lines are long.
    """

    path: str
    field: str = "text"
    calibration_share: float = 0.5
    name: str = "local"
    calibration_split: str = "train"
    evaluation_split: str = "test"

    def __post_init__(self) -> None:
        if not 0 < self.calibration_share < 1:
            raise UserError(
                f"data.calibration_share: {self.calibration_share} must lie between 0 and 1"
            )

    def documents(self, split: str) -> list[str]:
        return self._records(split) if self._has_records() else [self._plain(split)]

    def text(self, split: str) -> str:
        return "\n\n".join(self._records(split)) if self._has_records() else self._plain(split)

    def files(self, split: str) -> list[Path]:
        return [self._file()]

    def _file(self) -> Path:
        path = Path(self.path).expanduser().resolve()
        if not path.is_file():
            raise UserError(
                f"data.path: {self.path} is not a file; give a text, jsonl or parquet file"
            )
        return path

    def _has_records(self) -> bool:
        return self.path.endswith(RECORDS)

    def _records(self, split: str) -> list[str]:
        check_split(self, split, ("train", "test"))
        documents = []
        for record in read_records(self._file()):
            if not isinstance(text := record.get(self.field), str):
                raise UserError(
                    f"data.field: a record of {self.path} has no text under {self.field!r}; "
                    f"its fields are {', '.join(record)}"
                )
            documents.append(text)
        at = self.calibration_share
        return share(documents, (0.0, at) if split == "train" else (at, 1.0))

    def _plain(self, split: str) -> str:
        check_split(self, split, ("train", "test"))
        text = read_text(self._file())
        wanted = round(len(text) * self.calibration_share)
        # Split at a line break if one is shortly before the share, else at a space, else anywhere.
        near = round(0.8 * wanted)
        at = text.rfind("\n", near, wanted) + 1 or text.rfind(" ", near, wanted) + 1 or wanted
        if not text[:at].strip() or not text[at:].strip():
            raise UserError(
                f"data.path: {self.path} has too little text for a calibration and an evaluation "
                "part; give a longer file"
            )
        return text[:at] if split == "train" else text[at:]
