"""Sketch the report's charts of domains. All functions are pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from attribution.report.plots import (
    COLOURS,
    HARMFUL,
    HELPFUL,
    INK,
    NOTHING,
    OTHERS,
    Sketch,
    add_legend_below,
    choose_scale,
    label_step_axis,
    shortened,
)

MOST_DOMAINS = 40  # in a chart: those with the most samples
FEW_SAMPLES = 10  # with fewer, a domain gets no confidence interval

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DomainMean:
    """The mean value of a domain's samples."""

    domain: str
    samples: int  # that have a value
    mean: float
    error: float  # standard error of the mean


def sketch_domain_means(rows: Sequence[DomainMean], value_unit: str) -> Sketch:
    """Return the chart of mean values per sample, the highest first, with 95 % confidence intervals."""
    rows = sorted(rows, key=lambda row: (-row.samples, row.domain))[:MOST_DOMAINS]
    rows = sorted(rows, key=lambda row: (row.mean, row.domain))
    means = np.array([row.mean for row in rows])
    errors = np.array([1.96 * row.error if row.samples >= FEW_SAMPLES else 0.0 for row in rows])
    scale = choose_scale(float(np.abs(means).max()), value_unit)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        places = np.arange(len(rows))
        colours = [HELPFUL if mean >= 0 else HARMFUL for mean in means]
        bars = axes.barh(places, means * scale.factor, color=colours, height=0.7)
        for bar, row in zip(bars, rows, strict=True):
            bar.set_alpha(1.0 if row.samples >= FEW_SAMPLES else 0.35)
        known = errors > 0
        axes.errorbar(
            means[known] * scale.factor, places[known], xerr=errors[known] * scale.factor, fmt="none",
            ecolor=INK, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
        length = 16 if narrow else 28
        names = [f"{shortened(row.domain, length)} ({row.samples:,})" for row in rows]
        axes.set_yticks(places, names)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"mean value ({scale.name})" if narrow else f"mean value per sample ({scale.name})")
        axes.set_ylabel("domain (samples)")

    ranking = ", ".join(f"{row.domain} {row.mean * scale.factor:+.3g}" for row in reversed(rows))
    alt = f"Bar chart of the mean value per sample by domain, in {scale.name}, highest first: {ranking}."
    height = max(1.8, 0.9 + 0.27 * len(rows))
    return Sketch(draw, alt, height=height, narrow_height=height)


@dataclass(frozen=True)
class DomainBins:
    """Sums of values by domain and bin of steps."""

    domains: Sequence[str]
    edges: Numbers  # (bins + 1,) steps
    helpful: Numbers  # (domains, bins) sums of the positive values
    harmful: Numbers  # (domains, bins) sums of the negative values
    uses: Numbers  # (domains, bins) number of values

    @property
    def absolute(self) -> Numbers:
        """(domains, bins) Σ |values|"""
        return self.helpful - self.harmful


def sketch_domain_shares(bins: DomainBins) -> Sketch:
    """Return the chart of each domain's share of a bin's Σ|values|, helpful above zero and harmful below.

    All shares of a bin add up to 100 %.
    """
    total = bins.absolute.sum(0)
    percent = 100 / np.where(total == 0, np.inf, total)  # (bins,)
    order = np.argsort(-bins.absolute.sum(1), kind="stable")
    parts = [([number], bins.domains[number]) for number in order[: len(COLOURS)]]
    if len(order) > len(COLOURS):
        rest = list(order[len(COLOURS) :])
        parts.append((rest, "1 more domain" if len(rest) == 1 else f"{len(rest)} more domains"))

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        axes.use_sticky_edges = False  # leave a margin, so that a line at the edge is not cut off
        for values in (bins.helpful, bins.harmful):
            base = np.zeros(len(total))
            for (numbers, name), colour in zip(parts, (*COLOURS, OTHERS), strict=False):
                height = values[numbers].sum(0) * percent
                # a space first: matplotlib hides labels that begin with _
                label = " " + shortened(name, 28) if values is bins.helpful else None
                axes.bar(
                    bins.edges[:-1], height, np.diff(bins.edges), base, align="edge", color=colour,
                    label=label, edgecolor="white", linewidth=0.5,
                )  # fmt: skip
                base += height
        net = np.where(total == 0, np.nan, (bins.helpful + bins.harmful).sum(0) * percent)
        middle = (bins.edges[:-1] + bins.edges[1:]) / 2
        axes.plot(
            middle, net, color=INK, marker="o", markersize=3, linewidth=1, label="helpful minus harmful"
        )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("share of absolute value (%)")
        label_step_axis(axes, narrow)
        add_legend_below(figure, axes, columns=1 if narrow else 3)

    whole = bins.absolute.sum() or 1.0
    shares = [(bins.domains[number], bins.absolute[number].sum() / whole) for number in order]
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares)
    alt = f"Stacked bars by training step, helpful above zero, harmful below. Over all steps: {listed}."
    return Sketch(draw, alt, height=4.6, narrow_height=5.8)


def sketch_domain_course(bins: DomainBins) -> Sketch:
    """Return the heat map of each domain's mean value over training.

    The mean is divided by the mean |value| of all samples of the same steps.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        typical = bins.absolute.sum(0) / bins.uses.sum(0)
        cells = (bins.helpful + bins.harmful) / bins.uses / typical  # nan: no sample
    order = np.argsort(-bins.uses.sum(1), kind="stable")[:MOST_DOMAINS]
    known = np.abs(cells[np.isfinite(cells)])
    limit = float(np.quantile(known, 0.95)) if known.any() else 1.0
    colours = LinearSegmentedColormap.from_list("value", [HARMFUL, "#f7f7f7", HELPFUL])

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        axes.set_facecolor(NOTHING)
        mesh = axes.pcolormesh(
            bins.edges, np.arange(len(order) + 1), np.ma.masked_invalid(cells[order]), cmap=colours,
            vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.4,
        )  # fmt: skip
        length = 16 if narrow else 28
        names = [shortened(bins.domains[number], length) for number in order]
        axes.set_yticks(np.arange(len(order)) + 0.5, names)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_ylabel("domain")
        label_step_axis(axes, narrow)
        bar = figure.colorbar(mesh, ax=axes, location="bottom", extend="both", aspect=30)
        bar.set_label("mean value (× typical)" if narrow else "mean value (multiples of the typical value)")

    alt = (
        "Heat map, one row for each domain, over the training steps: blue where a domain's samples helped on "
        "average, orange where they hurt. The table of domains has the means over all steps."
    )
    height = max(2.6, 1.8 + 0.25 * len(order))
    return Sketch(draw, alt, height=height, narrow_height=height)
