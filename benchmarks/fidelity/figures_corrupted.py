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


def change(result: Result, dropped: str) -> float:
    """Return what dropping rows adds to the held-out loss, in thousandths of a nat."""
    losses = result["held_out"]
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
        start, end = (np.mean([np.mean(each) for each in losses]) for losses in (
            [one["start"] for one in some], [one["held_out"]["nothing"] for one in some]
        ))  # fmt: skip
        lines = [
            "| rows dropped, a tenth: those ranked lowest by | AUROC | corrupted among the dropped "
            "| held-out loss against dropping none, 10⁻³ nats |",
            "|---|---|---|---|",
        ]
        for name, words in DROPPED.items():
            auroc = found = "-"
            if name in SCORES:
                auroc = mean_and_error([one["auroc"][name] for one in some], 3)
                found = f"{np.mean([one['found'][name] for one in some]):.0%}"
            cells = [auroc, found, mean_and_error([change(one, name) for one in some], 2)]
            lines.append(f"| {words} | {' | '.join(cells)} |")
        parts.append(
            f"{kind}: {len(some)} seeds; held-out loss {start:.3f} before the second phase, {end:.3f} after it\n\n"
            + "\n".join(lines)
        )
    return "\n\n".join(parts)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw AUROC and what curation does to the held-out loss, a dot a seed."""
    with figure(path, (9, 6)) as drawn:
        panels = drawn.subplots(len(KINDS), 2, width_ratios=(4, 6), squeeze=False)
        jitter = np.random.default_rng(0)
        for (left, right), kind in zip(panels, KINDS, strict=True):
            some = [each for each in results if each["kind"] == kind]
            for number, name in enumerate(DROPPED):
                if name in SCORES:
                    dots(left, number, [one["auroc"][name] for one in some], COLOURS[number], jitter)
                dots(right, number, [change(one, name) for one in some], COLOURS[number], jitter)
            name_places(left, list(SCORES.values()))
            name_places(right, list(DROPPED.values()))
            left.axhline(0.5, color=INK, linewidth=0.6)
            right.axhline(0, color=INK, linewidth=0.6)
            left.set_ylabel(f"{kind}: AUROC")
            right.set_ylabel("held-out loss, 10⁻³ nats")
        panels[0][0].set_title("detection", fontsize=10)
        panels[0][1].set_title("training without the tenth ranked lowest", fontsize=10)
