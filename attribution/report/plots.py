"""A plot in the page: drawn by matplotlib in two widths, an SVG each, as the address of an image.

A browser takes the narrow one on a phone, where the wide one's text would be too small. Text stays text, so
that the browser's fonts have letters that matplotlib's lack. The same numbers give the same bytes.
"""

import io
import warnings
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite, log10

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from attribution.visible_text import visible

WIDE, NARROW = 9.0, 3.7  # inches; 96 CSS pixels each, of which a phone has some 360
INK, GRID, OTHERS, NOTHING = "#222222", "#dddddd", "#999999", "#c9c9c9"
# Okabe and Ito's colours, which people with any kind of colour blindness can tell apart
HELPFUL, HARMFUL = "#0072B2", "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
SETTINGS = {
    "svg.hashsalt": "attribution",  # ids that do not differ from one time to the next
    "svg.fonttype": "none",
    "text.parse_math": False,  # a domain's name may have dollar signs
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Draw = Callable[[Figure, bool], None]  # draws into a figure; whether it is the narrow one


@dataclass(frozen=True)
class Plot:
    """alt: what it shows, for whoever does not see it; wide, narrow: data: addresses; width, height: of the
    wide one, in CSS pixels."""

    alt: str
    wide: str
    narrow: str
    width: int
    height: int


@dataclass(frozen=True)
class Sketch:
    """A plot that is not drawn yet, which takes a while. Heights in inches."""

    draw: Draw
    alt: str
    height: float
    narrow_height: float

    def plot(self) -> Plot:
        wide = _address(self.draw, WIDE, self.height, narrow=False)
        narrow = _address(self.draw, NARROW, self.narrow_height, narrow=True)
        return Plot(self.alt, wide, narrow, round(WIDE * 96), round(self.height * 96))


def _address(draw: Draw, width: float, height: float, *, narrow: bool) -> str:
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        mpl.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib only measures the text
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, narrow)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "data:image/svg+xml;base64," + b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Unit:
    """A power of a thousand in which numbers are easy to read. name: "10⁻⁶ nats"; factor: 10⁶ then."""

    name: str
    factor: float


def unit_for(largest: float, name: str) -> Unit:
    """largest: the largest absolute value that is shown; name: of the unit itself, "" for none."""
    exponent = 3 * floor(log10(largest) / 3) if isfinite(largest) and largest > 0 else 0
    if exponent == 0:
        return Unit(name, 1.0)
    return Unit(f"10{str(exponent).translate(SUPERSCRIPTS)} {name}".strip(), 10.0**-exponent)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """What the axes show, below them, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns)


def step_axis(axes: Axes, narrow: bool) -> None:
    axes.set_xlabel("training step")
    first, last = axes.dataLim.intervalx
    if first == last:  # one step alone
        axes.set_xlim(first - 1, first + 1)
    thousands = narrow and last >= 10_000
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4 if narrow else 6))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1000:g}k" if thousands else f"{step:,.0f}")
    )


def shortened(name: str, length: int) -> str:
    """A domain's name in a plot, where control characters would make the SVG unreadable."""
    line = visible(" ".join(name.split()))
    return line if len(line) <= length else line[: length - 1] + "…"
