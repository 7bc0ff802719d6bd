"""The report's charts of losses, of the samples' values and of the efficiency check, each a pure function
from numbers to a `Sketch`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from attribution.report.plots import (
    COLOURS,
    HARMFUL,
    HELPFUL,
    INK,
    Sketch,
    legend_below,
    step_axis,
    unit_for,
)

MOST_POINTS = 1000  # more would hide each other: they are counted in hexagons, or thinned out on a line

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A kind of loss, one line (steps, losses) for each run. evaluated: now and then, so with markers."""

    label: str
    lines: Sequence[tuple[Numbers, Numbers]]
    evaluated: bool


def losses(curves: Sequence[Curve]) -> Sketch:
    """Losses in nats per token."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            style = {"marker": "os^Dv"[number], "linestyle": "--"} if curve.evaluated else {"linewidth": 1.2}
            if len(curve.lines[0][0]) == 1:  # no line goes through one point
                style["marker"] = "os^Dv"[number]
            for line, (steps, values) in enumerate(curve.lines):
                label = curve.label if line == 0 else None
                axes.plot(steps, values, label=label, color=COLOURS[number], markersize=5, **style)
        axes.set_ylabel("loss (nats per token)")
        step_axis(axes, narrow)
        legend_below(figure, axes, columns=1 if narrow else 2)

    alt = "Lines of losses by training step. " + " ".join(map(_ends, curves))
    return Sketch(draw, alt, height=4.2, narrow_height=4.8)


def _ends(curve: Curve) -> str:
    """Where a curve begins and ends, in the first run."""
    values = curve.lines[0][1]
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return f"{curve.label}: no number."
    return f"{curve.label}: from {values[0]:.3f} to {values[-1]:.3f}."


@dataclass(frozen=True)
class Histogram:
    """edges: (bins + 1,), 0 among them; counts: (bins,) samples, in the outermost bins with those beyond;
    share_negative: of the samples."""

    edges: Numbers
    counts: Numbers
    share_negative: float


def distribution(histogram: Histogram, unit_name: str) -> Sketch:
    """How many samples have which value."""
    unit = unit_for(float(np.abs(histogram.edges).max()), unit_name)
    edges, negative = histogram.edges * unit.factor, histogram.share_negative
    parts = {
        f"below zero (harmful): {100 * negative:.1f} % of the samples": (edges[1:] <= 0, HARMFUL),
        f"zero or above (helpful): {100 - 100 * negative:.1f} %": (edges[1:] > 0, HELPFUL),
    }

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for label, (chosen, colour) in parts.items():
            axes.bar(
                edges[:-1][chosen], histogram.counts[chosen], np.diff(edges)[chosen], align="edge",
                color=colour, edgecolor="white", linewidth=0.3, label=label,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axes.set_xlabel(f"value of a sample ({unit.name})")
        axes.set_ylabel("number of samples")
        legend_below(figure, axes, columns=1 if narrow else 2)

    alt = "Histogram of the samples' values; " + ", ".join(parts) + "."
    return Sketch(draw, alt, height=3.8, narrow_height=4.0)


@dataclass(frozen=True)
class Falls:
    """Falls of the validation loss, in nats: predicted, measured (n,)."""

    predicted: Numbers
    measured: Numbers


def efficiency_scatter(panels: dict[str, Falls]) -> Sketch:
    """Predicted against measured. panels: title -> the falls that are its points, at least one each."""

    def draw(figure: Figure, narrow: bool) -> None:
        grid = (len(panels), 1) if narrow else (1, len(panels))
        for axes, (title, falls) in zip(
            figure.subplots(*grid, squeeze=False).flat, panels.items(), strict=True
        ):
            _scatter(figure, axes, falls)
            axes.set_title(title, fontsize=10)

    alt = "Scatter plot of the predicted against the measured fall of the validation loss: " + ", ".join(
        f"{title}, {len(falls.predicted):,} points" for title, falls in panels.items()
    )
    return Sketch(draw, alt + ".", height=4.0, narrow_height=3.5 * len(panels))


def _scatter(figure: Figure, axes: Axes, falls: Falls) -> None:
    across = unit_for(float(np.abs(falls.predicted).max()), "nats")
    up = unit_for(float(np.abs(falls.measured).max()), "nats")
    x, y = falls.predicted * across.factor, falls.measured * up.factor
    if len(x) > MOST_POINTS:
        cells = axes.hexbin(x, y, gridsize=40, mincnt=1, bins="log", cmap="cividis_r", linewidths=0.2)
        bar = figure.colorbar(cells, ax=axes, format=FuncFormatter(lambda count, _: f"{count:,.0f}"))
        bar.set_label("number of points")
    else:
        axes.scatter(x, y, s=16, color=COLOURS[0], alpha=0.6, linewidths=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(f"predicted fall ({across.name})")
    axes.set_ylabel(f"measured fall ({up.name})")


def efficiency_course(steps: Numbers, falls: Falls) -> Sketch:
    """Both falls, added up from the first step on, of one run. steps: (n,)"""
    predicted, measured = falls.predicted.cumsum(), falls.measured.cumsum()
    highest = np.abs(predicted).max(), np.abs(measured).max()
    scale = highest[1] / highest[0] if min(highest) > 0 else 1.0
    thin = slice(None, None, -(-len(steps) // MOST_POINTS))

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        style = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
        axes.plot(steps[thin], measured[thin], color=COLOURS[5], label="measured", **style)
        label = f"predicted, times {scale:,.3g} for the same height"
        axes.plot(steps[thin], predicted[thin] * scale, "--", color=COLOURS[0], label=label, **style)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("fall so far (nats)" if narrow else "fall of the validation loss so far (nats)")
        step_axis(axes, narrow)
        legend_below(figure, axes, columns=1 if narrow else 2)

    alt = (
        "Lines of the fall of the validation loss so far, by training step. At the end: predicted "
        f"{predicted[-1]:.4g} nats, measured {measured[-1]:.4g} nats."
    )
    return Sketch(draw, alt, height=3.6, narrow_height=3.8)
