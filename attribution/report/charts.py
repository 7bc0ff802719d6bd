"""Sketch the report's charts of losses, sample values and the audit. All functions are pure."""

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
class Pairs:
    """Two values of each of some rows, in nats, both without the mean of the row's batch."""

    in_pass: Numbers  # (n,)
    exact: Numbers  # (n,)


def sketch_agreement(panels: dict[str, Pairs]) -> Sketch:
    """Return the scatter plots of exact against in-pass values.

    Args:
        panels: title -> the points of a plot, at least one.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        grid = (len(panels), 1) if narrow else (1, len(panels))
        for axes, (title, pairs) in zip(
            figure.subplots(*grid, squeeze=False).flat, panels.items(), strict=True
        ):
            _scatter(figure, axes, pairs)
            axes.set_title(title, fontsize=10)

    alt = "Scatter plot of the exact against the in-pass values of audited rows: " + ", ".join(
        f"{title}, {len(pairs.exact):,} points" for title, pairs in panels.items()
    )
    return Sketch(draw, alt + ".", height=4.0, narrow_height=3.5 * len(panels))


def _scatter(figure: Figure, axes: Axes, pairs: Pairs) -> None:
    largest = max(float(np.abs(each).max()) for each in (pairs.in_pass, pairs.exact))
    scale = choose_scale(largest, "nats")
    x, y = pairs.in_pass * scale.factor, pairs.exact * scale.factor
    if len(x) > MOST_POINTS:
        cells = axes.hexbin(x, y, gridsize=40, mincnt=1, bins="log", cmap="cividis_r", linewidths=0.2)
        bar = figure.colorbar(cells, ax=axes, format=FuncFormatter(lambda count, _: f"{count:,.0f}"))
        bar.set_label("number of rows")
    else:
        axes.scatter(x, y, s=16, color=COLOURS[0], alpha=0.6, linewidths=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"in-pass value ({scale.name})")
    axes.set_ylabel(f"exact value ({scale.name})")


def sketch_parts(steps: Numbers, parts: dict[str, Numbers], measured: Numbers) -> Sketch:
    """Return the chart of what made the validation loss fall in audited steps.

    Args:
        steps, measured: (n,).
        parts: name -> (n,), which add up to what is predicted.
    """
    predicted = np.sum(list(parts.values()), axis=0)
    largest = max(float(np.abs(each).max()) for each in (measured, predicted, *parts.values()))
    scale = choose_scale(largest, "nats")
    thin = slice(None, None, -(-len(steps) // MOST_POINTS))

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for number, (label, part) in enumerate(parts.items()):
            style: dict[str, Any] = {"marker": "s^D"[number], "markersize": 4, "linewidth": 0.8}
            axes.plot(steps[thin], part[thin] * scale.factor, color=COLOURS[number], label=label, **style)
        axes.plot(steps[thin], measured[thin] * scale.factor, "o", color=INK, markersize=5, label="measured")
        axes.plot(
            steps[thin], predicted[thin] * scale.factor, "--", color=COLOURS[5], label="all parts added up"
        )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel(f"fall in the step ({scale.name})")
        label_step_axis(axes, narrow)
        add_legend_below(figure, axes, columns=1 if narrow else 3)

    alt = (
        "Lines of the fall of the validation loss in audited steps, by training step. Added up over them: "
        + ", ".join(f"{name} {part.sum():.4g}" for name, part in parts.items())
        + f", together {predicted.sum():.4g}, measured {measured.sum():.4g} nats."
    )
    return Sketch(draw, alt, height=3.8, narrow_height=4.2)
