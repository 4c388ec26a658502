"""Matplotlib figures as PNG and SVG files."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.common.files import atomic


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches, on a canvas that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(empty)
    return empty


@dataclass(frozen=True)
class Picture:
    """A figure that is kept as a file."""

    figure: Any

    def content(self, suffix: str) -> bytes:
        """The file of this suffix, `.png` or `.svg`: equal figures have equal bytes."""
        if suffix == ".svg":
            return f"{self.svg()}\n".encode()
        file = io.BytesIO()
        self.figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    def png(self, path: Path) -> None:
        """Write the figure as a PNG file."""
        with atomic(path) as temporary:
            temporary.write_bytes(self.content(".png"))

    def svg(self) -> str:
        """An `<svg>` element; text is kept as text, not as paths."""
        from matplotlib import rc_context

        file = io.StringIO()
        # a fixed salt makes the ids, and so the file, reproducible
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qexp"}):
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # one decimal of a point is finer than a screen pixel, and the last digits are a processor's
        places = r' (?:d|x|y|width|height|points|transform)="(?:(?!scale)[^"])+"'
        text = re.sub(places, lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), text)
        return re.sub(r"\s*\n\s*", " ", text)
