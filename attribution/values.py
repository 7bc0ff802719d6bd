"""Sum a run's scores into values of its samples, documents and domains.

    python -m attribution.values RESULT_DIR [RESULT_DIR ...] [--normalise none|absolute|predicted]
        [--steps FIRST:LAST] [--output FOLDER] [--pile_data_dir D] [--memory_limit 4GB]

A sample's value is the sum of its values over the steps in which it was used: the first-order In-Run Data
Shapley value (Wang et al., arXiv 2406.11011). With several runs it is the mean of the runs' sums, where a run
that did not use the sample counts as 0. values_folder.FILES documents the files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attribution.audit import audit_lines, audit_sql
from attribution.completeness import Window
from attribution.database import MEMORY_LIMIT, Normalise, ScoreDatabase, parquet
from attribution.errors import AttributionError
from attribution.options import make_argument_parser, read_options, run_command
from attribution.samples import Samples, StoredSamples
from attribution.scored_run import ScoredRun, samples_of
from attribution.screen import plain_console, print_domains, print_samples
from attribution.values_folder import FILES, FORMAT, MANIFEST, Values, being_written, files_of
from attribution.words import DIVIDED, why_none, write_words
from data_processing.shards import write_json_atomically
from foundation.paths import path_argument
from score_store.run_folder import RunFolder
from score_store.samples import list_parts

EXTREMES = 3  # samples shown at either end


def write_values(
    runs: Sequence[ScoredRun],
    folder: Path,
    *,
    normalise: Normalise = "none",
    steps: Window = (None, None),
    memory_limit: str = MEMORY_LIMIT,
    pile_data_dir: Path | None = None,
) -> Values:
    """Write a folder of values. It replaces an older one, and is never there in part.

    Args:
        normalise, steps, memory_limit: as of `ScoreDatabase`.
        pile_data_dir: the folder of the splits; None: the one that the first run used.

    Raises:
        AttributionError: as `ScoreDatabase` and `ScoredRun.shards`; a value is not finite; the folder exists
            and holds something else, or another process writes it.
        ShardError: as `ScoredRun.shards`.
    """
    samples = samples_of(runs, pile_data_dir)
    with being_written(folder) as unfinished:
        with ScoreDatabase(
            runs, memory_limit=memory_limit, steps=steps, normalise=normalise, spill_folder=unfinished
        ) as database:
            write_tables(database, samples, unfinished)
            windows, by_word = database.windows, database.by_word
        samples.write_documents(unfinished, by_word)
        manifest = {
            **FORMAT,
            "normalise": normalise,
            "runs": [describe_run(run, window) for run, window in zip(runs, windows, strict=True)],
            "by_word": by_word,
            "rows": {
                name: pq.read_metadata(unfinished / f"{name}.parquet").num_rows for name in files_of(by_word)
            },
        }
        write_json_atomically(unfinished / MANIFEST, manifest)
    return Values.open(folder)


def print_values(values: Values, runs: Sequence[ScoredRun], pile_data_dir: Path | None) -> None:
    """Print domains, the most extreme samples, the audit and the paths of the files.

    Args:
        runs, pile_data_dir: those that the values were computed from.
    """
    screen = plain_console()
    samples = samples_of(runs, pile_data_dir)
    normalise = values.manifest["normalise"]
    unit = "fall of the validation loss, in nats" if normalise == "none" else f"normalised: {normalise}"
    screen.print(f"Value by domain ({unit})")
    print_domains(screen, values.read("domains"))
    highest, lowest = values.extremes("samples", EXTREMES)
    titles = {
        "\nmost helpful samples": highest.filter(pc.greater(highest["value"], 0)),
        "\nmost harmful samples, the worst first": lowest.filter(pc.less(lowest["value"], 0)),
    }
    print_samples(screen, titles, samples)
    screen.print()
    if normalise == "none":
        half, count = count_steps_of_half(values.read("steps"))
        screen.print(
            f"half of the sum of |values| comes from {half:,} of {count:,} steps; with --normalise absolute "
            "each step counts the same",
            soft_wrap=True,
        )
    screen.print(f"Values are {runs[0].kind}. What the audit of them says:", soft_wrap=True)
    for line in audit_lines(runs, values.read("audit")):
        screen.print(line, soft_wrap=True)
    screen.print()
    by_word = values.by_word
    if by_word is None:
        screen.print(f"There is no split of values by word: {why_none(runs)}.", soft_wrap=True)
    if samples.documents is not None:
        screen.print(f"A block’s value is divided among its documents {DIVIDED[by_word]}.", soft_wrap=True)
    screen.print()
    for name in files_of(by_word):
        screen.print(f"{values.manifest['rows'][name]:>12,} {name:10s} {values.path(name)}", soft_wrap=True)


def describe_run(run: ScoredRun, window: tuple[int, int]) -> dict[str, Any]:
    """Return a run's entry in the manifest."""
    return {
        "folder": str(run.folder.resolve()),
        "steps": window,
        **run.data,
        "validation_sha256": run.metadata["validation_sha256"],
    }


def sample_sums(database: ScoreDatabase) -> str:
    """Return SQL for sample_id, domain, block, value, steps, first_step, last_step of each sample, in no order.

    A sample whose rows have two domains is there twice: see `check_domains`.
    """
    return f"""
        SELECT
            sample_id, domain, block, fsum(weighted_value) / {len(database.runs)} AS value,
            count(weighted_value)::INTEGER AS steps, min(step) AS first_step, max(step) AS last_step
        FROM scores GROUP BY sample_id, domain, block
    """


def samples_sql(sums: str) -> str:
    """Return SQL for the columns of "samples", for the rows of `sums` in their order."""
    return f"SELECT {', '.join(FILES['samples'])} FROM (SELECT * REPLACE (domain::VARCHAR AS domain) FROM ({sums}))"


def check_domains(samples: Path) -> None:
    """Check that each sample has one domain, in a file of samples that is sorted by their ids.

    Raises:
        AttributionError: one has two.
    """
    columns, last = ["sample_id", "domain", "block"], None
    with pq.ParquetFile(samples) as file:
        for batch in file.iter_batches(1 << 16, columns=columns):
            ids = batch["sample_id"].to_numpy()
            again = np.flatnonzero(
                np.diff(ids, prepend=ids[0] - 1 if last is None else last["sample_id"]) == 0
            )
            if len(again):
                place = int(again[0])
                first = last if place == 0 else batch.slice(place - 1, 1).to_pylist()[0]
                second = batch.slice(place, 1).to_pylist()[0]
                assert first is not None
                raise AttributionError(
                    f"sample {second['sample_id']} has scores in two groups, {first['domain']!r} and "
                    f"{second['domain']!r}: a sample has one group; give it the same one in every step and run"
                )
            last = batch.slice(len(batch) - 1, 1).to_pylist()[0]


def check_kept(database: ScoreDatabase, samples: Samples, scored: Path) -> None:
    """Check that runs that keep their samples have each one of a file of samples, in the same group.

    Raises:
        AttributionError: they lack one, or have it in another group.
    """
    if not isinstance(samples, StoredSamples):
        return
    parts = [path for folder in samples.rows.folders for path in list_parts(folder)]
    kept = f'JOIN {parquet(*parts)} kept ON one.sample_id = kept.sample_id AND one.domain = kept."group"'
    lost = f"""
        SELECT one.domain, one.block FROM {parquet(scored)} one {f"ANTI {kept}" if parts else ""}
        ORDER BY one.sample_id LIMIT 1
    """
    for row in database.query(lost, "looking for the samples").to_pylist():
        samples.check(row["domain"], row["block"])


def write_tables(database: ScoreDatabase, samples: Samples, folder: Path) -> None:
    """Write all tables of a folder of values but the documents.

    Raises:
        AttributionError: a value is not finite; a sample has two domains; as `check_kept` and `write_words`.
    """
    check_finite(database)
    sums = f"{sample_sums(database)} ORDER BY sample_id"
    scored = folder / "samples.parquet"
    database.write(samples_sql(sums), scored, "summing samples")
    check_domains(scored)
    check_kept(database, samples, scored)
    if database.by_word is not None:
        write_words(database, folder / "words.parquet")
    domains = f"""
        SELECT
            domain, count(*) AS samples, sum(steps)::BIGINT AS uses, fsum(value) AS value,
            favg(value) AS mean_value, count_if(value < 0) / nullif(count(value), 0) AS share_negative,
            fsum(abs(value)) / nullif(sum(fsum(abs(value))) OVER (), 0) AS share_of_absolute
        FROM {parquet(scored)} GROUP BY domain ORDER BY mean_value DESC NULLS LAST, domain
    """
    database.write(domains, folder / "domains.parquet", "summing domains")
    columns = ", ".join(FILES["steps"])
    database.write(
        f"SELECT {columns} FROM steps ORDER BY run, step", folder / "steps.parquet", "writing steps"
    )
    database.write(audit_sql(), folder / "audit.parquet", "comparing audited values")


def count_steps_of_half(steps: pa.Table) -> tuple[int, int]:
    """Return the least number of steps that hold half of Σ|values|, and the number of steps with values."""
    absolute = np.sort(steps["absolute"].drop_null().to_numpy())[::-1]
    half = np.searchsorted(absolute.cumsum(), absolute.sum() / 2) + 1
    return min(int(half), len(absolute)), len(absolute)


def check_finite(database: ScoreDatabase) -> None:
    """Check that all values are finite: one that is not would spoil every sum.

    Raises:
        AttributionError: a step has values that are not finite.
    """
    sql = "SELECT run, step FROM steps WHERE NOT isfinite(absolute) ORDER BY step, run LIMIT 1"
    for row in database.query(sql, "looking for values that are not finite").to_pylist():
        raise AttributionError(
            f"{database.runs[row['run']].folder} has values in step {row['step']} that are not finite"
            + (f"; end before it with --steps :{row['step'] - 1}" if row["step"] > 0 else "")
        )


def main(argv: list[str]) -> None:
    parser = make_argument_parser(
        "attribution.values", "Values of the samples, documents and domains of a run."
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="FOLDER", help="[RESULT_DIR/values, of the first run]"
    )
    arguments = parser.parse_args(argv)
    options = read_options(arguments)
    values = write_values(
        options.runs,
        arguments.output or RunFolder(options.runs[0].folder).values,
        normalise=options.normalise,
        steps=options.steps,
        memory_limit=options.memory_limit,
        pile_data_dir=options.pile_data_dir,
    )
    print_values(values, options.runs, options.pile_data_dir)


if __name__ == "__main__":
    sys.exit(run_command("attribution.values", main, sys.argv[1:]))
