"""Make the tables and the plot of what groups.py measured.

The linear datamodeling score (LDS) is the mean over seeds of Spearman's correlation over a seed's groups. Its interval
holds 95 % of 2,000 bootstrap draws: each draws seeds, and within each of them groups, with replacement.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.report.plots import COLOURS, INK
from benchmarks.fidelity.drawing import figure, name_places
from benchmarks.fidelity.values import METHODS

SCORES = {
    **METHODS,
    "end_dot": "gradients at the end",
    "end_cosine": "their cosine",
    "bm25": "BM25",
    "random": "random",
}
DRAWS = 2000
Array = npt.NDArray[np.float64]


@dataclass
class Seed:
    """One seed's scores of rows, groups of rows, and the falls of the loss that were measured."""

    left_in: npt.NDArray[np.bool_]  # (groups, rows)
    scores: dict[str, dict[str, Array]]  # by epochs and method, (rows,)
    falls: dict[str, Array]  # by epochs, (groups,)
    whole: dict[str, float]  # by epochs, the fall of the loss with all rows

    def sums(self, epochs: str, method: str) -> Array:
        """Return the sum of the scores of the rows that each group leaves in (groups,)."""
        return self.left_in @ self.scores[epochs][method]


def seed_of(values: dict[str, Any], groups: Sequence[dict[str, Any]]) -> Seed:
    """Return one seed's groups of one size."""
    scores = {
        epochs: {name: np.array(each) for name, each in some.items()}
        for epochs, some in values["scores"].items()
    }
    before, after = values["loss"]["0"], values["loss"]
    left_in = np.zeros((len(groups), rows_of(values)), bool)
    for number, group in enumerate(groups):
        left_in[number, group["left_in"]] = True
    falls = {
        epochs: np.array([before - group["loss"][epochs] for group in groups]) for epochs in groups[0]["loss"]
    }
    return Seed(left_in, scores, falls, {epochs: before - after[epochs] for epochs in falls})


def rows_of(values: dict[str, Any]) -> int:
    """Return how many rows were scored."""
    return len(next(iter(values["scores"].values()))["random"])


def seeds_of(results: Sequence[dict[str, Any]]) -> dict[str, list[Seed]]:
    """Return the seeds by how they were trained and how much was left out, in words."""
    found: dict[str, list[Seed]] = defaultdict(list)
    for values in (each for each in results if "scores" in each):
        setting, sizes = values["setting"], defaultdict(list)
        for each in results:
            if "left_in" in each and each["setting"] == setting:
                sizes[len(each["left_in"])].append(each)
        clipped = f"clipped to {setting['clip']:g}" if setting["clip"] else "unclipped"
        for left_in, groups in sorted(sizes.items()):
            if len(groups) >= 10:  # else it is hardly measured yet
                name = f"{setting['optimizer']}, {clipped}, {1 - left_in / rows_of(values):.0%} left out"
                found[name].append(seed_of(values, groups))
    return found


def spearman(x: Array, y: Array) -> Array:
    """Return Spearman's correlation over the last dimension, (draws,) of (draws, groups)."""
    ranks = [pd.DataFrame(each.T).rank().to_numpy().T for each in (x, y)]
    a, b = (each - each.mean(1, keepdims=True) for each in ranks)
    return np.asarray((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))


def lds(seeds: Sequence[Seed], epochs: str, method: str) -> tuple[float, float, float]:
    """Return the LDS and the ends of its interval."""
    draw = np.random.default_rng(0)
    point, drawn = [], []
    for seed in seeds:
        x, y = seed.sums(epochs, method), seed.falls[epochs]
        point.append(spearman(x[None], y[None])[0])
        # As many draws of groups as the draws of seeds may ask for
        chosen = draw.integers(len(x), size=(DRAWS * len(seeds), len(x)))
        drawn.append(spearman(x[chosen], y[chosen]).reshape(DRAWS, len(seeds)))
    of_seed = draw.integers(len(seeds), size=(DRAWS, len(seeds)))
    means = np.stack(drawn)[of_seed, np.arange(DRAWS)[:, None], np.arange(len(seeds))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean(point)), float(low), float(high)


def slope(seed: Seed, epochs: str, method: str) -> float:
    """Return the slope of a regression of the measured falls on the sums of values."""
    x, y = seed.sums(epochs, method), seed.falls[epochs]
    x = x - x.mean()
    return float(x @ y / (x @ x))


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return all tables of this experiment."""
    parts = []
    for name, seeds in seeds_of(results).items():
        stops = list(seeds[0].falls)
        heads = " | ".join(f"{epochs} epochs" for epochs in stops)
        groups = sum(len(seed.left_in) for seed in seeds)
        lines = [f"| LDS | {heads} |", f"|{'---|' * (1 + len(stops))}"]
        for method, words in SCORES.items():
            found = [lds(seeds, epochs, method) for epochs in stops]
            cells = " | ".join(f"{point:.2f} ({low:.2f} to {high:.2f})" for point, low, high in found)
            lines.append(f"| {words} | {cells} |")
        for method in ("in_pass", "exact"):
            cells = " | ".join(f"{np.median([slope(s, e, method) for s in seeds]):.2g}" for e in stops)
            lines.append(f"| slope, measured / predicted, {SCORES[method]} (median) | {cells} |")
        for words, of_seed in (
            ("fall of the loss with all rows, nats", lambda s, e: s.whole[e]),
            ("fall with a group's rows, mean", lambda s, e: s.falls[e].mean()),
            ("its standard deviation over groups", lambda s, e: s.falls[e].std(ddof=1)),
        ):
            cells = " | ".join(f"{np.mean([of_seed(s, e) for s in seeds]):.3f}" for e in stops)
            lines.append(f"| {words} | {cells} |")
        parts.append(f"{name}: {len(seeds)} seeds, {groups} groups\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the LDS of each method by epochs, with its interval."""
    found = seeds_of(results)
    with figure(path, (9, 3.4 * len(found))) as drawn:
        panels = drawn.subplots(len(found), 1, squeeze=False)[:, 0]
        for axes, (name, seeds) in zip(panels, found.items(), strict=True):
            stops = list(seeds[0].falls)
            for number, epochs in enumerate(stops):
                point, low, high = np.array([lds(seeds, epochs, method) for method in SCORES]).T
                x = np.arange(len(SCORES)) + (number - (len(stops) - 1) / 2) * 0.22
                axes.errorbar(
                    x,
                    point,
                    yerr=[point - low, high - point],
                    fmt="o",
                    color=COLOURS[number],
                    markersize=4,
                    label=f"{epochs} epochs",
                )
            name_places(axes, list(SCORES.values()))
            axes.axhline(0, color=INK, linewidth=0.6)
            axes.set_title(f"{name}, {len(seeds)} seeds", fontsize=10)
            axes.set_ylabel("LDS, with 95 % interval")
        panels[0].legend(frameon=False)
