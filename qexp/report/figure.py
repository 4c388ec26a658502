"""A figure whose marks can be asked what they are."""

import io
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from qexp.common.files import atomic


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(made)
    return made


@dataclass
class Picture:
    """A figure, and what to say of the marks in it that have an id."""

    figure: Any
    says: dict[str, str] = field(default_factory=dict)

    def name(self, text: str) -> str:
        """An id for a mark of which `text` is to be said."""
        mark = f"mark{len(self.says)}"
        self.says[mark] = text
        return mark

    def png(self, path: Path) -> None:
        """Write it as a PNG."""
        with atomic(path) as temporary:
            self.figure.savefig(temporary, format="png")

    def svg(self) -> str:
        """An `<svg>` element whose marks carry titles; its text stays text."""
        from matplotlib import rc_context

        file = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qexp"}):  # no random ids
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # tenths of a point are finer than a screen
        text = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), text)
        text = re.sub(r"\s*\n\s*", " ", text)
        return re.sub(r'<g id="(mark\d+)">', self._titled, text)

    def _titled(self, found: re.Match[str]) -> str:
        return f'<g class="mark"><title>{escape(self.says[found[1]])}</title>'
