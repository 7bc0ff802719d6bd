"""Make the tables and the plot of the states that one_step.py measured.

Within each state the predicted and the measured values of its rows are compared: Pearson's r, the slope of a regression
of the measured on the predicted, and the ratio of their sums. The tables show the mean and the worst r, the median
slope and the median and largest distance of the ratio from 1.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attribution.report.plots import COLOURS, INK
from benchmarks.fidelity.drawing import dots, figure

State = dict[str, Any]  # as one_step.measure returns it
METHODS = {"plain-0": "plain", "in_pass-0": "in pass", "lookahead-0": "look-ahead", "exact": "exact"}
INTERVALS = (1, 2, 4, 8, 16)


def compare(state: State, method: str, measured: str) -> tuple[float, float, float]:
    """Return r, the slope, and the ratio of the sums, measured over predicted."""
    x, y = np.array(state[method]), np.array(state[measured])
    dx, dy = x - x.mean(), y - y.mean()
    return (
        float(dx @ dy / np.sqrt((dx @ dx) * (dy @ dy))),
        float(dx @ dy / (dx @ dx)),
        float(y.sum() / x.sum()),
    )


def ceiling(state: State) -> float:
    """Return the r that true Shapley values would have with the estimated ones, given their standard errors."""
    noise = np.square(state["shapley_error"]).mean() / np.var(state["shapley"], ddof=1)
    return float(np.sqrt(max(0.0, 1 - noise)))


def group_of(state: State) -> tuple[str, str, str]:
    """Return the group of a state in the tables: optimizer, clipping, and phase."""
    setting = state["setting"]
    clipped = "clipped" if setting["clip"] else "unclipped"
    return setting["optimizer"], clipped, f"t = {state['t']}"


def table(
    states: Sequence[State], measured: str, key: Callable[[State], tuple[str, ...]], heads: Sequence[str]
) -> str:
    """Return a Markdown table of all methods, a line for each key; the last column is what sampling alone allows."""
    groups: dict[tuple[str, ...], list[State]] = defaultdict(list)
    for state in states:
        if measured in state:
            groups[key(state)].append(state)
    columns = [*heads, "states", *(f"{name}: r (worst), slope" for name in METHODS.values())]
    if measured == "shapley":
        columns.append("r that sampling allows (worst)")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in sorted(groups, key=lambda each: [(len(part), part) for part in each]):
        cells = []
        for method in METHODS:
            r, slope, _ = np.array([compare(state, method, measured) for state in groups[group]]).T
            cells.append(f"{r.mean():.3f} ({r.min():.2f}), {np.median(slope):.2g}")
        if measured == "shapley":
            best = [ceiling(state) for state in groups[group]]
            cells.append(f"{np.mean(best):.3f} ({min(best):.2f})")
        lines.append(f"| {' | '.join(group)} | {len(groups[group])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sums(states: Sequence[State]) -> str:
    """Return how far the sum of exact values is from that of the Shapley values, in words.

    Where helpful and harmful rows cancel, the sum is near zero, and the distance is small beside their sizes alone.
    """
    measured = [state for state in states if "shapley" in state]
    off = np.array([abs(sum(state["exact"]) - sum(state["shapley"])) for state in measured])
    parts = []
    for what, sizes in (
        ("of the sum", [abs(sum(state["shapley"])) for state in measured]),
        ("of the sum of their sizes", [sum(map(abs, state["shapley"])) for state in measured]),
    ):
        share = off / np.array(sizes)
        parts.append(f"median {np.median(share):.1%} and largest {share.max():.1%} {what}")
    return f"{', '.join(parts)}, in {len(measured)} states"


def ages(states: Sequence[State], measured: str) -> str:
    """Return a Markdown table of r by the number of steps K for which a validation gradient is used."""
    lines = [
        f"| AdamW, t | validation point | {' | '.join(f'K = {k}' for k in INTERVALS)} |",
        f"|{'---|' * (2 + len(INTERVALS))}",
    ]
    for t in sorted({state["t"] for state in states}):
        some = [each for each in states if each["t"] == t and each["setting"]["optimizer"] == "AdamW"]
        for point, name in (("in_pass", "current"), ("lookahead", "look-ahead")):
            cells = []
            for k in INTERVALS:
                found = [
                    np.mean([compare(state, f"{point}-{age}", measured)[0] for age in range(k)])
                    for state in some
                    if f"{point}-{k - 1}" in state
                ]
                cells.append(f"{np.mean(found):.2f}" if found else "-")
            lines.append(f"| {t} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(states: Sequence[State]) -> str:
    """Return all tables of this experiment."""
    small = [state for state in states if state["setting"]["layers"] == 2]
    large = [state for state in states if state["setting"]["layers"] > 2]
    parts = []
    for name, some in (("2 layers", small), ("4 layers, full vocabulary", large)):
        if not some:
            continue
        for measured in ("removal", "shapley", "integral"):
            if not any(measured in state for state in some):
                continue
            parts.append(f"{name}, against {measured}")
            parts.append(table(some, measured, group_of, ("optimizer", "gradient", "step")))
        parts.append(f"{name}: sum of the exact values against that of the Shapley values: {sums(some)}")
    parts.append("2 layers, AdamW by learning rate, against removal")
    adamw = [state for state in small if state["setting"]["optimizer"] == "AdamW"]
    parts.append(table(adamw, "removal", lambda state: (f"{state['setting']['lr']:g}",), ("learning rate",)))
    parts.append("2 layers, r against removal by K")
    parts.append(ages(small, "removal"))
    return "\n\n".join(parts)


def plot(states: Sequence[State], path: Path) -> None:
    """Draw r of each state by method and optimizer, a dot a state."""
    with figure(path, (9, 3.6)) as drawn:
        panels = drawn.subplots(1, 2, sharey=True)
        jitter = np.random.default_rng(0)
        for axes, optimizer in zip(panels, ("AdamW", "SGD"), strict=True):
            some = [each for each in states if each["setting"]["optimizer"] == optimizer]
            for number, method in enumerate(METHODS):
                r = [compare(state, method, "removal")[0] for state in some]
                dots(axes, number, r, COLOURS[number], jitter)
            axes.set_xticks(range(len(METHODS)), list(METHODS.values()))
            axes.set_title(f"{optimizer}, {len(some)} states", fontsize=10)
            axes.axhline(0, color=INK, linewidth=0.6)
        panels[0].set_ylabel("correlation with one-step removal")
