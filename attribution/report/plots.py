"""Draw plots with matplotlib: two SVGs each, a wide and a narrow one, as data: addresses.

A phone's browser takes the narrow one, because the wide one's text would be too small there. Text in the SVG
stays text: the browser's fonts have letters that matplotlib's lack. The same numbers give the same bytes.
"""

import io
import warnings
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, MaxNLocator

from attribution.visible_text import visible

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

WIDE, NARROW = 9.0, 3.7  # inches of 96 CSS pixels; a phone is about 360 pixels wide
INK, GRID, OTHERS, NOTHING = "#222222", "#dddddd", "#999999", "#c9c9c9"
# Okabe and Ito's colours, distinct with any kind of colour blindness
HELPFUL, HARMFUL = "#0072B2", "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
SETTINGS: "dict[RcKeyType, Any]" = {
    "svg.hashsalt": "attribution",  # a fixed salt gives the same ids every time
    "svg.fonttype": "none",
    "text.parse_math": False,  # a domain's name may have dollar signs
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Draw = Callable[[Figure, bool], None]  # draws into a figure; the bool is true for the narrow one


@dataclass(frozen=True)
class Plot:
    """A plot as the template shows it."""

    alt: str  # alternative text
    wide: str  # a data: address
    narrow: str  # a data: address
    width: int  # of the wide one, in CSS pixels
    height: int


@dataclass(frozen=True)
class Sketch:
    """A plot to be drawn later, with a progress bar, because drawing is slow."""

    draw: Draw
    alt: str  # alternative text
    height: float  # inches
    narrow_height: float  # inches

    def plot(self) -> Plot:
        """Draw both widths."""
        wide = _address(self.draw, WIDE, self.height, narrow=False)
        narrow = _address(self.draw, NARROW, self.narrow_height, narrow=True)
        return Plot(self.alt, wide, narrow, round(WIDE * 96), round(self.height * 96))


def _address(draw: Draw, width: float, height: float, *, narrow: bool) -> str:
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # ignore the user's matplotlibrc
        mpl.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib only measures the text
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, narrow)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "data:image/svg+xml;base64," + b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Scale:
    """A power of a thousand that makes numbers easy to read."""

    name: str  # for example "10⁻⁶ nats"
    factor: float  # on the values; then 10⁶


def choose_scale(largest: float, name: str) -> Scale:
    """Return the scale for values of at most `largest`, in absolute value. name: of their unit; "": none."""
    exponent = 3 * floor(log10(largest) / 3) if isfinite(largest) and largest > 0 else 0
    if exponent == 0:
        return Scale(name, 1.0)
    return Scale(f"10{str(exponent).translate(SUPERSCRIPTS)} {name}".strip(), 10.0**-exponent)


def add_legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Put the legend below the axes, where it covers nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns)


def label_step_axis(axes: Axes, narrow: bool) -> None:
    """Label the x axis with training steps."""
    axes.set_xlabel("training step")
    first, last = axes.dataLim.intervalx
    if first == last:  # a single step
        axes.set_xlim(first - 1, first + 1)
    thousands = narrow and last >= 10_000
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4 if narrow else 6))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1000:g}k" if thousands else f"{step:,.0f}")
    )


def shortened(name: str, length: int) -> str:
    """Return a domain's name for a plot, without control characters, which are invalid in an SVG."""
    line = visible(" ".join(name.split()))
    return line if len(line) <= length else line[: length - 1] + "…"
