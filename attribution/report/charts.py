"""Sketch the report's charts of losses, sample values and the efficiency check. All functions are pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    add_legend_below,
    choose_scale,
    label_step_axis,
)

MOST_POINTS = 1000  # more would overlap: a scatter plot counts them in hexagons, a line is thinned out

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One kind of loss."""

    label: str
    lines: Sequence[tuple[Numbers, Numbers]]  # (steps, losses) of each run
    evaluated: bool  # whether it is measured in some steps only; then it is drawn with markers


def sketch_losses(curves: Sequence[Curve]) -> Sketch:
    """Return the chart of losses, in nats per token."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            style: dict[str, Any] = {"linewidth": 1.2}
            if curve.evaluated:
                style = {"marker": "os^Dv"[number], "linestyle": "--"}
            if len(curve.lines[0][0]) == 1:  # one point makes no line
                style["marker"] = "os^Dv"[number]
            for line, (steps, values) in enumerate(curve.lines):
                label = curve.label if line == 0 else None
                axes.plot(steps, values, label=label, color=COLOURS[number], markersize=5, **style)
        axes.set_ylabel("loss (nats per token)")
        label_step_axis(axes, narrow)
        add_legend_below(figure, axes, columns=1 if narrow else 2)

    alt = "Lines of losses by training step. " + " ".join(map(_ends, curves))
    return Sketch(draw, alt, height=4.2, narrow_height=4.8)


def _ends(curve: Curve) -> str:
    """Return a sentence on a curve's first and last loss, in the first run."""
    values = curve.lines[0][1]
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return f"{curve.label}: no number."
    return f"{curve.label}: from {values[0]:.3f} to {values[-1]:.3f}."


@dataclass(frozen=True)
class Histogram:
    """Number of samples by value."""

    edges: Numbers  # (bins + 1,) one of them is 0
    counts: Numbers  # (bins,) the outermost bins also count the samples beyond them
    share_negative: float  # of the samples


def sketch_distribution(histogram: Histogram, value_unit: str) -> Sketch:
    """Return the histogram of sample values."""
    scale = choose_scale(float(np.abs(histogram.edges).max()), value_unit)
    edges, negative = histogram.edges * scale.factor, histogram.share_negative
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
        axes.set_xlabel(f"value of a sample ({scale.name})")
        axes.set_ylabel("number of samples")
        add_legend_below(figure, axes, columns=1 if narrow else 2)

    alt = "Histogram of the samples' values; " + ", ".join(parts) + "."
    return Sketch(draw, alt, height=3.8, narrow_height=4.0)


@dataclass(frozen=True)
class Falls:
    """Falls of the validation loss, in nats."""

    predicted: Numbers  # (n,)
    measured: Numbers  # (n,)


def sketch_falls(panels: dict[str, Falls]) -> Sketch:
    """Return the scatter plots of predicted against measured falls.

    Args:
        panels: title -> the points of a plot, at least one.
    """

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
    across = choose_scale(float(np.abs(falls.predicted).max()), "nats")
    up = choose_scale(float(np.abs(falls.measured).max()), "nats")
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


def sketch_fall_course(steps: Numbers, falls: Falls) -> Sketch:
    """Return the chart of both falls of one run, added up from the first step on. steps: (n,)"""
    predicted, measured = falls.predicted.cumsum(), falls.measured.cumsum()
    highest = np.abs(predicted).max(), np.abs(measured).max()
    stretch = highest[1] / highest[0] if min(highest) > 0 else 1.0
    thin = slice(None, None, -(-len(steps) // MOST_POINTS))

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        style: dict[str, Any] = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
        axes.plot(steps[thin], measured[thin], color=COLOURS[5], label="measured", **style)
        label = f"predicted, times {stretch:,.3g} for the same height"
        axes.plot(steps[thin], predicted[thin] * stretch, "--", color=COLOURS[0], label=label, **style)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("fall so far (nats)" if narrow else "fall of the validation loss so far (nats)")
        label_step_axis(axes, narrow)
        add_legend_below(figure, axes, columns=1 if narrow else 2)

    alt = (
        "Lines of the fall of the validation loss so far, by training step. At the end: predicted "
        f"{predicted[-1]:.4g} nats, measured {measured[-1]:.4g} nats."
    )
    return Sketch(draw, alt, height=3.6, narrow_height=3.8)
