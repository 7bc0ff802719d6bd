"""Make the tables and the plot of what corrupted.py measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attribution.report.plots import COLOURS, INK
from benchmarks.fidelity.corrupted import KINDS, SCORES
from benchmarks.fidelity.drawing import dots, figure, name_places

Result = dict[str, Any]  # as corrupted.measure returns it
DROPPED = {**SCORES, "corrupted": "the corrupted ones", "random": "random ones"}


PARTS = {"validation": "validation loss", "held_out": "held-out loss"}


def change(result: Result, part: str, dropped: str) -> float:
    """Return what dropping rows adds to the loss of some rows, in thousandths of a nat."""
    losses = result["end"][part]
    return float(np.mean(losses[dropped]) - np.mean(losses["nothing"])) * 1000


def mean_and_error(numbers: Sequence[float], digits: int) -> str:
    """Return the mean of the seeds' numbers and its standard error, in words."""
    error = np.std(numbers, ddof=1) / np.sqrt(len(numbers))
    return f"{np.mean(numbers):.{digits}f} ± {error:.{digits}f}"


def tables(results: Sequence[Result]) -> str:
    """Return a table for each kind of corruption; ± is the standard error over seeds."""
    parts = []
    for kind in KINDS:
        some = [each for each in results if each["kind"] == kind]
        if len(some) < 2:
            continue  # not measured yet
        start = np.mean([one["start"]["held_out"] for one in some])
        end = np.mean([one["end"]["held_out"]["nothing"] for one in some])
        lines = [
            "| dropped: the tenth ranked lowest by | AUROC | corrupted among them "
            "| validation loss, 10⁻³ nats | held-out loss, 10⁻³ nats |",
            "|---|---|---|---|---|",
        ]
        for name, words in DROPPED.items():
            auroc = found = "-"
            if name in SCORES:
                auroc = mean_and_error([one["auroc"][name] for one in some], 2)
                found = f"{np.mean([one['found'][name] for one in some]):.0%}"
            changes = [mean_and_error([change(one, part, name) for one in some], 1) for part in PARTS]
            lines.append(f"| {words} | {auroc} | {found} | {' | '.join(changes)} |")
        parts.append(
            f"{kind}: {len(some)} seeds; held-out loss {start:.3f} before the second phase, {end:.3f} after it; the "
            "table has its change by dropping rows\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw AUROC and what dropping rows does to the losses, a dot a seed."""
    with figure(path, (12, 6)) as drawn:
        panels = drawn.subplots(len(KINDS), 1 + len(PARTS), width_ratios=(4, 6, 6), squeeze=False)
        jitter = np.random.default_rng(0)
        for (first, *others), kind in zip(panels, KINDS, strict=True):
            some = [each for each in results if each["kind"] == kind]
            for number, name in enumerate(SCORES):
                dots(first, number, [one["auroc"][name] for one in some], COLOURS[number], jitter)
            name_places(first, list(SCORES.values()))
            first.axhline(0.5, color=INK, linewidth=0.6)
            first.set_ylabel(f"{kind}: AUROC")
            for axes, part in zip(others, PARTS, strict=True):
                for number, name in enumerate(DROPPED):
                    dots(axes, number, [change(one, part, name) for one in some], COLOURS[number], jitter)
                name_places(axes, list(DROPPED.values()))
                axes.axhline(0, color=INK, linewidth=0.6)
                axes.set_ylabel("change, 10⁻³ nats")
        panels[0][0].set_title("detection", fontsize=10)
        for axes, words in zip(panels[0][1:], PARTS.values(), strict=True):
            axes.set_title(f"{words} without the tenth ranked lowest by", fontsize=10)
