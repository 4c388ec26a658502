"""Matplotlib figures as PNG files."""

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
    """A figure that is kept as a PNG file."""

    figure: Any

    def png(self, path: Path) -> None:
        """Write the figure as a PNG file."""
        with atomic(path) as temporary:
            self.figure.savefig(temporary, format="png")
