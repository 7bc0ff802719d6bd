"""Make the table and the plot of the states that later.py measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attribution.report.plots import COLOURS, INK
from benchmarks.fidelity.drawing import dots, figure, name_places

State = dict[str, Any]  # as later.measure returns it
OF = {"removal": "the effect after the step itself", "exact": "exact value", "in_pass": "value in pass"}


def correlations(states: Sequence[State], of: str, age: str) -> list[float]:
    """Return within each state the correlation over rows with the effect after `age` steps."""
    return [
        float(
            np.corrcoef(state["effects"]["1"] if of == "removal" else state[of], state["effects"][age])[0, 1]
        )
        for state in states
    ]


def tables(states: Sequence[State]) -> str:
    """Return a Markdown table by step and age: mean r and the worst one."""
    ages = list(states[0]["effects"])
    lines = [
        f"| step | r with the effect after | {' | '.join(f'{age} steps' for age in ages)} |",
        "|---" * (2 + len(ages)) + "|",
    ]
    for t in sorted({state["t"] for state in states}):
        some = [state for state in states if state["t"] == t]
        for of, name in OF.items():
            found = [correlations(some, of, age) for age in ages]
            cells = [f"{np.mean(each):.2f} ({min(each):.2f})" for each in found]
            lines.append(f"| t = {t} ({len(some)} states) | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(states: Sequence[State], path: Path) -> None:
    """Draw r of exact values with effects by age, a dot a state."""
    jitter, ages = np.random.default_rng(0), list(states[0]["effects"])
    with figure(path, (5, 3.4)) as drawn:
        axes = drawn.subplots()
        for number, age in enumerate(ages):
            dots(axes, number, correlations(states, "exact", age), COLOURS[number], jitter)
        axes.axhline(0, color=INK, linewidth=0.6)
        name_places(axes, [f"{age} step{'' if age == '1' else 's'}" for age in ages])
        axes.set_ylabel("correlation of exact values\nwith the effect after")
