"""How far values describe the run: the fall of the validation loss that they predict, and the measured one.

First-order values add up to the fall if the loss is linear over a step and the update is the (clipped)
gradient times the learning rate. Under SGD with small steps correlation and ratio are near 1; what they are
under AdamW, whose update is another one, is for each run to see. Always of values that are not normalised.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

WINDOWS = (1, 50)  # steps added up; over many, what the next batch happens to do counts less
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Efficiency:
    """Of one run. window: steps that are added up; count: of such windows; correlation: Pearson's, between
    the windows' predicted and measured falls, None below three windows or where one of them is constant;
    ratio: Σ measured / Σ predicted over them, None where nothing is predicted."""

    run: int
    window: int
    count: int
    correlation: float | None
    ratio: float | None

    def __str__(self) -> str:
        over = "each step" if self.window == 1 else f"windows of {self.window} steps"
        if self.count == 0:
            return f"{over}: fewer than {self.window} have a predicted and a measured fall"
        correlation = "-" if self.correlation is None else f"{self.correlation:+.3f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.3g}"
        return f"{over}: correlation {correlation}, measured / predicted {ratio} ({self.count} of them)"


def efficiency(steps: pa.Table) -> list[Efficiency]:
    """One for each run and each of WINDOWS. steps: run, predicted, measured, as in a folder of values."""
    return [
        efficiency_over(run, predicted, measured, window)
        for run, predicted, measured in falls(steps)
        for window in WINDOWS
    ]


def steps_of_half(steps: pa.Table) -> tuple[int, int]:
    """The fewest steps that have half of the sum of |values| between them, and how many have values."""
    absolute = np.sort(steps["absolute"].drop_null().to_numpy())[::-1]
    half = np.searchsorted(absolute.cumsum(), absolute.sum() / 2) + 1
    return min(int(half), len(absolute)), len(absolute)


def falls(steps: pa.Table) -> Iterator[tuple[int, Numbers, Numbers]]:
    """For each run, predicted and measured falls (s,) of its steps that have both: the last step has no
    measured one, and a step without scores predicts none."""
    runs = steps["run"].to_numpy()
    predicted, measured = (
        steps[name].to_numpy(zero_copy_only=False) for name in ("predicted", "measured")
    )  # NaN: none
    both = ~(np.isnan(predicted) | np.isnan(measured))
    for run in np.unique(runs).tolist():
        chosen = both & (runs == run)
        yield run, predicted[chosen], measured[chosen]


def window_sums(numbers: Numbers, window: int) -> Numbers:
    """(s,) -> (s // window,): sums of so many neighbours; the rest at the end is left out."""
    count = len(numbers) // window
    return numbers[: count * window].reshape(count, window).sum(1)


def efficiency_over(run: int, predicted: Numbers, measured: Numbers, window: int) -> Efficiency:
    """predicted, measured: (s,) of steps that follow each other."""
    predicted, measured = window_sums(predicted, window), window_sums(measured, window)
    correlation = ratio = None
    if len(predicted) >= 3 and predicted.std() > 0 and measured.std() > 0:
        correlation = float(np.corrcoef(predicted, measured)[0, 1])
    if predicted.sum() != 0:
        ratio = float(measured.sum() / predicted.sum())
    return Efficiency(run, window, len(predicted), correlation, ratio)
