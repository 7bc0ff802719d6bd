"""Compare the values of a run's backward passes with the exact ones, in the steps that were audited.

Rows are compared within their own batch, after the batch's mean is subtracted: which of two rows of a step helped
more? Agreement between steps would say little, because all values shrink in the course of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import pyarrow as pa

from attribution.database import ScoreDatabase
from attribution.scored_run import ScoredRun
from score_store.schema import IN_PASS

PHASES = (100, 1_000, 10_000)  # the steps, counted from 0, at which a new phase of training begins
FEW_ROWS = 30  # fewer say too little
LEAST_CORRELATION = 0.8  # Pearson's, and
SLOPES = (1 / 3, 3.0)  # between which values can be read as amounts, and
LARGEST_DISTANCE = 0.25  # of exact values from the measured falls, up to which they can
ROUNDING = 2e-6  # nats, of a fall that is measured in float32

AUDITED = """
    SELECT
        run, step, CASE {phases} END AS phase, exact_value, of_batch, momentum, decay, measured_fall, cosine,
        {in_pass} AS in_pass
    FROM scores WHERE of_batch IS NOT NULL
"""
OF_ROWS = """
    WITH centred AS (
        SELECT
            run, phase, in_pass - avg(in_pass) OVER same AS x, exact_value - avg(exact_value) OVER same AS y
        FROM ({audited}) WHERE in_pass IS NOT NULL AND exact_value IS NOT NULL WINDOW same AS (PARTITION BY run, step)
    ), ranked AS (  -- ties have their mean rank
        SELECT
            *, rank() OVER (PARTITION BY run, phase ORDER BY x)
                + count(*) OVER (PARTITION BY run, phase, x) / 2 AS rank_x,
            rank() OVER (PARTITION BY run, phase ORDER BY y)
                + count(*) OVER (PARTITION BY run, phase, y) / 2 AS rank_y
        FROM centred
    )
    SELECT
        run, phase, count(*) AS rows, corr(x, y) AS pearson, corr(rank_x, rank_y) AS spearman,
        sum(x * y) / nullif(sum(x * x), 0) AS slope
    FROM ranked GROUP BY run, phase
"""
OF_STEPS = """
    SELECT
        run, phase, min(step) AS first, max(step) AS last, count(*) AS steps, avg(cosine) AS cosine,
        sum(in_pass) AS in_pass, sum(of_batch) AS of_batch,
        sum(of_batch) FILTER (WHERE in_pass IS NOT NULL) AS of_same_batch,
        sum(momentum) AS momentum, sum(decay) AS decay, sum(measured_fall) AS measured,
        sum(greatest(abs(of_batch - measured_of_batch) - {rounding}, 0)) / nullif(sum(abs(measured_of_batch)), 0)
            AS distance
    FROM (
        SELECT
            run, step, any_value(phase) AS phase, fsum(in_pass) AS in_pass, any_value(of_batch) AS of_batch,
            any_value(momentum) AS momentum, any_value(decay) AS decay, any_value(cosine) AS cosine,
            any_value(measured_fall) AS measured_fall,
            any_value(measured_fall - momentum - decay) AS measured_of_batch
        FROM ({audited}) GROUP BY run, step
    ) GROUP BY run, phase
"""
# The rows that a plot shows: at most LIMIT, the same ones each time.
TO_PLOT = """
    SELECT phase, x, y, step FROM (
        SELECT
            run, step, phase, in_pass - avg(in_pass) OVER same AS x, exact_value - avg(exact_value) OVER same AS y
        FROM ({audited}) WHERE in_pass IS NOT NULL AND exact_value IS NOT NULL WINDOW same AS (PARTITION BY run, step)
    ) ORDER BY hash(run, step, x, y), run, step, x, y LIMIT 5000
"""
COLUMNS = {
    "run": "int32",
    "first": "int64",  # first and last audited step of the phase
    "last": "int64",
    "steps": "int64",  # that were audited
    "rows": "int64",  # with both values; null: none has
    "pearson": "double",  # correlations of in-pass and exact values within their batches
    "spearman": "double",
    "slope": "double",  # of a regression of the exact on the in-pass values
    "cosine": "double",  # between the validation gradients before and after the batch's part, the mean
    "in_pass": "double",  # Σ in-pass values, in nats; null: none of the steps has them
    "of_batch": "double",  # Σ exact values of the whole batches
    "of_same_batch": "double",  # the same, of the steps that have in-pass values
    "momentum": "double",  # what earlier gradients did
    "decay": "double",  # what weight decay did
    "measured": "double",  # the measured fall of the validation loss in these steps
    # Between the exact values of a step and the measured fall without momentum and decay: Σ |distance| over the
    # steps, over Σ |fall|. Null: nothing fell.
    "distance": "double",
}
SQL_TYPES = {"int32": "INTEGER", "int64": "BIGINT", "double": "DOUBLE"}


@dataclass(frozen=True)
class Audit:
    """One phase of a run's training."""

    run: int
    first: int
    last: int
    steps: int
    rows: int | None
    pearson: float | None
    spearman: float | None
    slope: float | None
    cosine: float | None
    in_pass: float | None
    of_batch: float
    of_same_batch: float | None
    momentum: float
    decay: float
    measured: float
    distance: float | None

    @property
    def too_few(self) -> bool:
        """Return whether there are too few rows to say how well their values agree."""
        numbers = (self.pearson, self.spearman, self.slope)  # not finite if one of the two kinds never varies
        return (
            self.rows is None
            or self.rows < FEW_ROWS
            or not all(number is not None and isfinite(number) for number in numbers)
        )

    def __str__(self) -> str:
        return (
            f"steps {self.first:,} to {self.last:,} ({self.steps:,} audited): {self.agreement}; {self.fall}"
        )

    @property
    def agreement(self) -> str:
        """Return how well in-pass values agree with exact ones, in words."""
        if self.too_few:
            return f"{self.rows or 0} rows, too few to say"
        assert self.pearson is not None and self.spearman is not None and self.slope is not None
        return (
            f"correlation {self.pearson:+.2f} (of ranks {self.spearman:+.2f}, {self.rows:,} rows), "
            f"exact / in-pass {self.slope:.3g}"
        )

    @property
    def fall(self) -> str:
        """Return how all parts add up, in words."""
        cosine = "-" if self.cosine is None else f"{self.cosine:.3f}"
        in_pass = "-" if self.in_pass is None else f"{self.in_pass:+.3g}"
        return (
            f"values {self.of_batch:+.3g} (in pass {in_pass}), momentum {self.momentum:+.3g}, decay "
            f"{self.decay:+.3g} of a measured fall of {self.measured:+.3g} nats"
            + ("" if self.distance is None else f" (batches are {self.distance:.0%} off)")
            + f"; cosine of the validation gradients {cosine}"
        )

    def _sums_disagree(self) -> bool:
        """Return whether in-pass values add up to another fall than the exact ones."""
        if self.in_pass is None or self.of_same_batch is None:
            return False
        if max(abs(self.in_pass), abs(self.of_same_batch)) < self.steps * ROUNDING:
            return False
        return self.of_same_batch == 0 or not SLOPES[0] <= self.in_pass / self.of_same_batch <= SLOPES[1]

    def warnings(self, exact: bool) -> list[str]:
        """Return, in plain words, what the values of this phase cannot be used for, and what would help.

        Args:
            exact: whether the run's values are the exact ones.
        """
        found = []
        when = f"In steps {self.first:,} to {self.last:,}"
        if not self.too_few and not exact:
            assert self.pearson is not None and self.slope is not None
            if self.pearson < LEAST_CORRELATION:
                found.append(
                    f"{when} values order the samples of a batch poorly (correlation "
                    f"{self.pearson:.2f}, below {LEAST_CORRELATION}): --values exact or --validation_point lookahead "
                    "would help, or --steps to leave these steps out."
                )
            elif not SLOPES[0] <= self.slope <= SLOPES[1]:
                found.append(
                    f"{when} values are not amounts: the true ones are "
                    f"{self.slope:.3g} times as large. Their order is right; --values exact gives amounts."
                )
        if not found and not exact and self._sums_disagree():
            found.append(
                f"{when} in-pass values add up to {self.in_pass:+.3g} nats, and exact ones to "
                f"{self.of_same_batch:+.3g}: leave these steps out (--steps), or take --values exact."
            )
        if self.distance is not None and not self.distance <= LARGEST_DISTANCE:
            found.append(
                f"{when} even exact values are {self.distance:.0%} off from what their batches did to the loss: the "
                "steps are too long for values of one step; a lower learning rate or more validation rows would help."
            )
        return found


def measure_audit(database: ScoreDatabase) -> pa.Table:
    """Return the audit of each run and phase, with COLUMNS; without rows if no step was audited."""
    return database.query(audit_sql(), "comparing audited values")


def audit_sql() -> str:
    """Return SQL for COLUMNS."""
    columns = ", ".join(f"{name}::{SQL_TYPES[kind]} AS {name}" for name, kind in COLUMNS.items())
    steps, rows = (sql.format(audited=_audited(), rounding=ROUNDING) for sql in (OF_STEPS, OF_ROWS))
    return f"SELECT {columns} FROM ({steps}) LEFT JOIN ({rows}) USING (run, phase) ORDER BY run, first"


def audited_rows(database: ScoreDatabase) -> pa.Table:
    """Return some audited rows, for a plot: phase, x (in pass) and y (exact), each without the batch's mean."""
    return database.query(TO_PLOT.format(audited=_audited()), "reading audited values")


def audited_steps(database: ScoreDatabase, run: int) -> pa.Table:
    """Return the audited steps of a run: step, of_batch, momentum, decay, measured."""
    sql = f"""
        SELECT step, any_value(of_batch) AS of_batch, any_value(momentum) AS momentum, any_value(decay) AS decay,
            any_value(measured_fall) AS measured
        FROM ({_audited()}) WHERE run = {run} GROUP BY step ORDER BY step
    """
    return database.query(sql, "reading audited steps")


def phase_name(phase: int) -> str:
    """Return the steps of a phase, in words."""
    first = 0 if phase == 0 else PHASES[phase - 1]
    return f"from step {first:,}" if phase == len(PHASES) else f"steps {first:,} to {PHASES[phase] - 1:,}"


def _audited() -> str:
    bounds = " ".join(f"WHEN step < {bound} THEN {number}" for number, bound in enumerate(PHASES))
    return AUDITED.format(phases=f"{bounds} ELSE {len(PHASES)}", in_pass=IN_PASS)


def read_audits(table: pa.Table) -> list[Audit]:
    """Return the rows of `measure_audit`."""
    return [Audit(**row) for row in table.to_pylist()]


def without_audit(run: ScoredRun) -> str:
    """Return, in words, why a run has no audit."""
    if "of_batch" in run.lacks:
        return (
            "an older version of this program wrote these scores, without what exact values are compared with"
        )
    return (
        "no step was audited (--audit_interval 0, or a loop without exact values), so it is unknown how far its values "
        "can be trusted"
    )


def audit_lines(runs: Sequence[ScoredRun], table: pa.Table) -> list[str]:
    """Return what the audit of some runs says, line by line. table: of `measure_audit`."""
    lines, audits = [], read_audits(table)
    for number, run in enumerate(runs):
        own = [each for each in audits if each.run == number]
        name = f"{run.folder.resolve().name}: " if len(runs) > 1 else ""
        if not own:
            lines.append(f"{name}{without_audit(run)}")
        lines += [f"{name}{each}" for each in own]
        lines += [f"{name}{warning}" for each in own for warning in each.warnings(run.exact)]
    return lines
