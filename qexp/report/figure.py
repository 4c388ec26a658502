"""Matplotlib figures as PNG, and as SVG with a tooltip for each mark."""

import io
import re
from dataclasses import dataclass, field
from html import escape
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


@dataclass
class Picture:
    """A figure, and the tooltip of each mark by the mark's id."""

    figure: Any
    says: dict[str, str] = field(default_factory=dict)

    def name(self, text: str) -> str:
        """A new id for a mark whose tooltip is `text`."""
        mark = f"mark{len(self.says)}"
        self.says[mark] = text
        return mark

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
        """An `<svg>` element with a `<title>` in each mark; text is kept as text, not as paths."""
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
        text = re.sub(r"\s*\n\s*", " ", text)
        return re.sub(r'<g id="(mark\d+)">', self._titled, text)

    def _titled(self, match: re.Match[str]) -> str:
        return f'<g class="mark"><title>{escape(self.says[match[1]])}</title>'
