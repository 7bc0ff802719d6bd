"""What the plots of all experiments share: one look, and the same bytes for the same numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attribution.report.plots import INK


@contextmanager
def figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure of a size in inches, to draw panels in, and write it as an SVG file."""
    with mpl.rc_context({"svg.hashsalt": "fidelity", "svg.fonttype": "none"}):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn
        for axes in drawn.axes:
            axes.grid(axis="y", color="#dddddd")
            axes.spines[["top", "right"]].set_visible(False)
        drawn.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def dots(axes: Axes, x: float, y: Sequence[float], colour: str, jitter: np.random.Generator) -> None:
    """Draw a dot for each number and a line at their mean."""
    places = x + jitter.uniform(-0.25, 0.25, len(y))
    axes.plot(places, y, "o", color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
    axes.plot([x - 0.35, x + 0.35], [np.mean(y)] * 2, color=INK, linewidth=1.5)


def name_places(axes: Axes, names: Sequence[str]) -> None:
    """Write the names under the places 0, 1, ..., one word a line."""
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
