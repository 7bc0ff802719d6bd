"""Reduce the tables of scores and values to the small tables that the report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from attribution.database import ScoreDatabase, parquet
from attribution.documents import FIRST
from attribution.report.charts import Curve, Histogram
from attribution.report.domain_charts import DomainBins, DomainMean
from attribution.values_folder import Values

STEP_BINS = 30
VALUE_BINS = 30  # on either side of zero
WITHIN = 0.99  # share of the samples in the histogram's range
CURVE_POINTS = 500

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Totals:
    """Counts and shares over all samples."""

    samples: int
    valued: int  # samples with a value
    uses: int  # that gave a value
    share_negative: float  # of the valued samples
    negative_part: float  # of Σ |values of samples|


def count_samples(database: ScoreDatabase, values: Values) -> Totals:
    """Return the totals. At least one sample must have a value. values: of the database's runs."""
    rows = database.query(
        f"""
        SELECT count(*) AS samples, count(value) AS valued, sum(steps)::BIGINT AS uses,
            count_if(value < 0) / count(value) AS share_negative,
            coalesce(-fsum(value) FILTER (WHERE value < 0) / nullif(fsum(abs(value)), 0), 0) AS negative_part
        FROM {parquet(values.path("samples"))}
        """,
        "counting samples",
    )
    return Totals(**rows.to_pylist()[0])


def average_domains(database: ScoreDatabase, values: Values) -> list[DomainMean]:
    """Return the mean value of each domain that has values, sorted by name."""
    rows = database.query(
        f"""
        SELECT domain, count(value) AS samples, favg(value) AS mean,
            coalesce(stddev_samp(value), 0) / sqrt(count(value)) AS error
        FROM {parquet(values.path("samples"))} WHERE value IS NOT NULL GROUP BY domain ORDER BY domain
        """,
        "comparing domains",
    )
    return [DomainMean(**row) for row in rows.to_pylist()]


def count_by_value(database: ScoreDatabase, values: Values) -> Histogram:
    """Return the histogram of values, in bins of equal width.

    At most 1 % of the samples, the most extreme ones, lie outside of its range.
    """
    samples = parquet(values.path("samples"))
    # Count by eighths of a power of two: this gives an approximate quantile without sorting all samples.
    sizes = database.query(
        f"""
        SELECT floor(log2(abs(value)) * 8)::INTEGER AS size, count(*) AS samples FROM {samples}
        WHERE value != 0 GROUP BY size ORDER BY size
        """,
        "finding the range of values",
    ).to_pylist()
    width = _limit(sizes) / VALUE_BINS
    rows = database.query(
        f"""
        SELECT CASE
            WHEN value < 0 THEN {VALUE_BINS - 1} - least(floor(-value / {width!r}), {VALUE_BINS - 1})
            ELSE {VALUE_BINS} + least(floor(value / {width!r}), {VALUE_BINS - 1})
        END::INTEGER AS place, count(*) AS samples
        FROM {samples} WHERE value IS NOT NULL GROUP BY place ORDER BY place
        """,
        "counting samples by value",
    ).to_pylist()
    counts = np.zeros(2 * VALUE_BINS)
    for row in rows:
        counts[row["place"]] = row["samples"]
    first, last = min(rows[0]["place"], VALUE_BINS), max(rows[-1]["place"], VALUE_BINS - 1)
    edges = np.arange(-VALUE_BINS, VALUE_BINS + 1, dtype=np.float64) * width
    share_negative = float(counts[:VALUE_BINS].sum() / counts.sum())
    return Histogram(edges[first : last + 2], counts[first : last + 1], share_negative)


def _limit(sizes: Sequence[Mapping[str, int]]) -> float:
    """Return the absolute value below which WITHIN of the samples lie."""
    if not sizes:
        return 1.0  # all are zero
    counts = np.array([row["samples"] for row in sizes])
    place = int(np.searchsorted(counts.cumsum(), WITHIN * counts.sum()))
    return float(2.0 ** ((sizes[place]["size"] + 1) / 8))


def sum_domains_by_step(database: ScoreDatabase) -> DomainBins:
    """Return sums by bin of steps for the domains that were used, sorted by name, as means over the runs."""
    first = min(window[0] for window in database.windows)
    last = max(window[1] for window in database.windows)
    width = -(-(last + 1 - first) // STEP_BINS)
    rows = database.query(
        f"""
        SELECT domain::VARCHAR AS domain, (step - {first}) // {width} AS bin,
            coalesce(fsum(weighted_value) FILTER (WHERE weighted_value > 0), 0) AS helpful,
            coalesce(fsum(weighted_value) FILTER (WHERE weighted_value < 0), 0) AS harmful,
            count(weighted_value) AS uses
        FROM scores GROUP BY ALL ORDER BY ALL
        """,
        "summing domains by step",
    ).to_pydict()
    names = sorted(set(rows["domain"]))
    edges = np.append(np.arange(first, last + 1, width), last + 1).astype(float)
    tables = {name: np.zeros((len(names), len(edges) - 1)) for name in ("helpful", "harmful", "uses")}
    numbers = {name: number for number, name in enumerate(names)}
    places = [numbers[domain] for domain in rows["domain"]], rows["bin"]
    for name, table in tables.items():
        table[places] = np.array(rows[name], float) / len(database.runs)
    return DomainBins(names, edges, **tables)


def find_sample_uses(database: ScoreDatabase, sample_ids: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Return, for each of these samples, the uses that gave it a value: run, step, value.

    Values are weighted. Their sum, divided by the number of runs, is the sample's value.
    """
    found: dict[int, list[dict[str, Any]]] = {sample_id: [] for sample_id in sample_ids}
    rows = database.query(
        """
        SELECT sample_id, run, step, weighted_value AS value FROM scores
        WHERE list_contains(?, sample_id) AND value IS NOT NULL ORDER BY sample_id, run, step, rank
        """,
        "looking for the steps of the samples shown",
        [list(sample_ids)],
    )
    for row in rows.to_pylist():
        found[row.pop("sample_id")].append(row)
    return found


def count_document_uses(
    database: ScoreDatabase, values: Values, document: Mapping[str, Any], block_size: int
) -> dict[str, int]:
    """Return how many uses gave values to a document's samples, and the first and last step of these.

    Args:
        document: a row of "documents".
    """
    begin = document["first_token"] - FIRST[values.by_word]
    first = begin // block_size  # the block in which its first token is a target
    last = (begin + document["tokens"] - 1) // block_size
    rows = database.query(
        f"""
        SELECT sum(steps)::BIGINT AS uses, min(first_step) AS first_step, max(last_step) AS last_step
        FROM {parquet(values.path("samples"))}
        WHERE domain = ? AND block BETWEEN ? AND ?
        """,
        "looking for the samples of the documents shown",
        [document["domain"], first, last],
    )
    counts: dict[str, int] = rows.to_pylist()[0]
    return counts


def collect_loss_curves(
    steps: pa.Table, metrics: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[list[Curve], int]:
    """Return the losses of training batches, validation rows and evaluations, and the steps per point.

    Args:
        steps: as in a folder of values.
        metrics: the records of each run.
    """
    run, step = steps["run"].to_numpy(), steps["step"].to_numpy()
    per_point = -(-int(np.bincount(run).max()) // CURVE_POINTS)
    curves = []
    for name, label in (("train_loss", "training batch"), ("val_loss", "validation rows")):
        losses = steps[name].to_numpy(zero_copy_only=False)
        chosen = [run == number for number in range(len(metrics))]
        lines = [
            (average_neighbours(step[rows], per_point), average_neighbours(losses[rows], per_point))
            for rows in chosen
        ]
        curves.append(Curve(label, lines, evaluated=False))
    for name in ("train", "val", "test"):
        lines = [collect_evaluations(records, f"loss/{name}", step.min(), step.max()) for records in metrics]
        if any(len(line[0]) for line in lines):
            curves.append(Curve(f"evaluation on {name}", lines, evaluated=True))
    return curves, per_point


def average_neighbours(numbers: npt.NDArray[Any], count: int) -> Numbers:
    """Return the means of `count` neighbours each; the last may have fewer."""
    starts = np.arange(0, len(numbers), count)
    return np.add.reduceat(numbers.astype(float), starts) / np.diff(np.append(starts, len(numbers)))


def collect_evaluations(
    records: Sequence[Mapping[str, Any]], name: str, first: int, last: int
) -> tuple[Numbers, Numbers]:
    """Return steps and losses of the evaluations in a range of steps. NaN: a non-finite loss."""
    found = [(record["step"], record[name]) for record in records if name in record]
    found = [(step, np.nan if loss is None else loss) for step, loss in found if first <= step <= last]
    return np.array([step for step, _ in found], float), np.array([loss for _, loss in found], float)
