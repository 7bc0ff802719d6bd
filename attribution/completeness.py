"""Check that no score of a run is missing: sums over part of the score files would be wrong."""

import re

import duckdb

from attribution.errors import AttributionError
from attribution.scored_run import ScoredRun
from score_store.files import FILE_NAME

Window = tuple[int | None, int | None]  # first and last step, both included; None: the run's first or last

# The first range of steps in the window without scores.
HOLE = """
    SELECT step + 1, next - 1
    FROM (
        SELECT step, lead(step, 1, $last + 1) OVER (ORDER BY step) AS next
        FROM (SELECT step FROM steps WHERE run = $run UNION ALL SELECT $first - 1)
    )
    WHERE next > step + 1 ORDER BY step LIMIT 1
"""
UNEVEN = """
    SELECT step, rows, expected FROM steps WHERE run = $run AND rows != expected ORDER BY step LIMIT 1
"""
DAMAGED = "SELECT step FROM steps WHERE run = $run AND damaged > 0 ORDER BY step LIMIT 1"
AGAIN = "files are missing; copy the folder again, or repeat the run"


def check_window(run: ScoredRun, steps: Window) -> tuple[int, int]:
    """Return the first and last step of the window.

    Raises:
        AttributionError: the run's scores do not cover the window.
    """
    names = [FILE_NAME.fullmatch(path.name) for path in run.files]
    ranges = [(int(name[1]), int(name[2])) for name in names if name is not None]
    begin, end = min(first for first, _ in ranges), max(last for _, last in ranges)
    first, last = (0 if steps[0] is None else steps[0], end if steps[1] is None else steps[1])
    if steps[0] is None and begin > 0:
        raise AttributionError(f"{run.folder} has no scores of steps 0 to {begin - 1}: {AGAIN}")
    if steps[1] is None:
        _check_end(run, end)
    if not begin <= first <= last <= end:
        asked = ":".join("" if step is None else str(step) for step in steps)
        raise AttributionError(f"--steps {asked}: {run.folder} has scores of steps {begin} to {end}")
    return first, last


def _check_end(run: ScoredRun, end: int) -> None:
    """Check that scores reach the newest checkpoint, because training writes scores first."""
    names = [re.fullmatch(r"step_(\d{6,})", path.name) for path in run.folder.glob("checkpoints/*")]
    done = max((int(name[1]) for name in names if name is not None), default=0)
    if end + 1 < done:
        raise AttributionError(
            f"{run.folder} has a checkpoint after {done} steps, but no scores of steps {end + 1} to "
            f"{done - 1}: {AGAIN}"
        )


def check_steps(
    database: duckdb.DuckDBPyConnection, number: int, run: ScoredRun, window: tuple[int, int]
) -> None:
    """Check that every step of the window is whole.

    A step is whole if all samples of its global batch have scores, and if each value is the product of its
    factors.

    Args:
        database: with the table `steps` of `ScoreDatabase`.
        number: of the run in that table.

    Raises:
        AttributionError: a step is missing, incomplete or damaged.
    """
    first, last = window
    hole = database.execute(HOLE, {"run": number, "first": first, "last": last}).fetchone()
    if hole is not None:
        raise AttributionError(f"{run.folder} has no scores of steps {hole[0]} to {hole[1]}: {AGAIN}")
    uneven = database.execute(UNEVEN, {"run": number}).fetchone()
    if uneven is not None:
        step, rows, expected = uneven
        raise AttributionError(
            f"{run.folder} has scores of {rows} samples in step {step}, and its global batch has {expected}: "
            "a process's files are missing, or the run is still training and not all processes have written "
            "that step" + (f" (--steps :{step - 1} ends before it)" if step > first else "")
        )
    damaged = database.execute(DAMAGED, {"run": number}).fetchone()
    if damaged is not None:
        raise AttributionError(
            f"{run.folder} has a value in step {damaged[0]} that is not lr · clip_factor · row_weight · "
            "dot_product, or not the exact value: a score file is damaged; copy the folder again, or repeat "
            "the run"
        )
