"""Compare the fall of the validation loss that values predict with the measured one.

First-order values add up to the fall if the loss is linear over a step and the update is the (clipped)
gradient times the learning rate. Under SGD with small steps, correlation and ratio are near 1. AdamW's update
differs, so each run must be checked. Values are never normalised here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

WINDOWS = (1, 50)  # steps added up; a long window averages out the noise of single batches
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Efficiency:
    """Agreement of predicted and measured falls in one run."""

    run: int
    window: int  # steps added up
    count: int  # number of windows
    correlation: float | None  # Pearson's; None below three windows, or where one side is constant
    ratio: float | None  # Σ measured / Σ predicted; None if Σ predicted is 0

    def __str__(self) -> str:
        over = "each step" if self.window == 1 else f"windows of {self.window} steps"
        if self.count == 0:
            return f"{over}: fewer than {self.window} have a predicted and a measured fall"
        correlation = "-" if self.correlation is None else f"{self.correlation:+.3f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.3g}"
        return f"{over}: correlation {correlation}, measured / predicted {ratio} ({self.count} of them)"


def measure_efficiency(steps: pa.Table) -> list[Efficiency]:
    """Return the agreement for each run and each of WINDOWS.

    Args:
        steps: run, predicted, measured, as in a folder of values.
    """
    return [
        measure_window(run, predicted, measured, window)
        for run, predicted, measured in select_falls(steps)
        for window in WINDOWS
    ]


def count_steps_of_half(steps: pa.Table) -> tuple[int, int]:
    """Return the least number of steps that hold half of Σ|values|, and the number of steps with values."""
    absolute = np.sort(steps["absolute"].drop_null().to_numpy())[::-1]
    half = np.searchsorted(absolute.cumsum(), absolute.sum() / 2) + 1
    return min(int(half), len(absolute)), len(absolute)


def select_falls(steps: pa.Table) -> Iterator[tuple[int, Numbers, Numbers]]:
    """Yield each run's number with the predicted and the measured falls (s,) of its steps that have both.

    The last step has no measured fall, and a step without values no predicted one.
    """
    runs = steps["run"].to_numpy()
    # NaN stands for a missing fall.
    predicted, measured = (steps[name].to_numpy(zero_copy_only=False) for name in ("predicted", "measured"))
    both = ~(np.isnan(predicted) | np.isnan(measured))
    for run in np.unique(runs).tolist():
        chosen = both & (runs == run)
        yield run, predicted[chosen], measured[chosen]


def sum_windows(numbers: Numbers, window: int) -> Numbers:
    """Return the sums of `window` neighbours each, (s,) -> (s // window,). A shorter rest is left out."""
    count = len(numbers) // window
    sums: Numbers = numbers[: count * window].reshape(count, window).sum(1)
    return sums


def measure_window(run: int, predicted: Numbers, measured: Numbers, window: int) -> Efficiency:
    """Return the agreement for one length of window. predicted, measured: (s,) of consecutive steps."""
    predicted, measured = sum_windows(predicted, window), sum_windows(measured, window)
    correlation = ratio = None
    if len(predicted) >= 3 and predicted.std() > 0 and measured.std() > 0:
        correlation = float(np.corrcoef(predicted, measured)[0, 1])
    if predicted.sum() != 0:
        ratio = float(measured.sum() / predicted.sum())
    return Efficiency(run, window, len(predicted), correlation, ratio)
