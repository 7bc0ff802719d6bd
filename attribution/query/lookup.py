"""Find what a query names: a text, a training sample, or a validation row and the samples that helped it."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from attribution.database import ScoreDatabase
from attribution.errors import AttributionError
from attribution.query.text_search import Place, find_documents
from attribution.samples import StoredSamples
from attribution.scored_run import ScoredRun
from attribution.values import samples_sql
from attribution.values_folder import highest_and_lowest
from data_processing.shards import Shard
from data_processing.tokenizer_files import tokenizer_of


def check_text(text: str) -> None:
    """Raise AttributionError for a text that no training text can contain, or that all do."""
    if not text:
        raise AttributionError("--text '': is everywhere; give some words of a training document")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AttributionError(f"--text: is not UTF-8 ({error}); the training documents are") from error


def find_stored_text(samples: StoredSamples, text: str, count: int) -> tuple[list[tuple[str, int]], int]:
    """Return the first `count` samples, domain and number, that contain the text, and how many do.

    Raises AttributionError as `find_text`.
    """
    check_text(text)
    found, total = samples.containing(text, count)
    if not found:
        raise AttributionError(
            f"--text: none of the {len(samples.rows):,} training samples contains it; every letter counts, "
            "also spaces, line ends and capitals: try a shorter piece"
        )
    return found, total


def find_text(shards: Sequence[Shard], text: str, count: int) -> tuple[list[Place], int]:
    """Return the text's place in the first `count` documents that contain it, and how many contain it.

    Raises:
        AttributionError: the text is empty, not Unicode, or in no document.
    """
    check_text(text)
    places = find_documents(shards, text, tokenizer_of(shards[0].ids, shards[0].data_dir))
    first = list(islice(places, count))
    if not first:
        documents = sum(shard.num_documents for shard in shards)
        raise AttributionError(
            f"--text: none of the {documents:,} training documents in {shards[0].path.parent} contains it; "
            "every letter counts, also spaces, line ends and capitals: try a shorter piece"
        )
    return first, len(first) + sum(1 for _ in places)


def find_validation_row(run: ScoredRun, number: int) -> dict[str, Any]:
    """Return a row of `ScoredRun.validation_rows`.

    Raises:
        AttributionError: there is no such row, or the run has no scores for single rows.
    """
    if run.granularity != "pairwise":
        raise AttributionError(
            f"--validation {number}: {run.folder} has scores of granularity {run.granularity}, of all "
            "validation rows together; train with --score_granularity pairwise for scores of each of them"
        )
    rows = run.validation_rows()
    if not 0 <= number < len(rows):
        raise AttributionError(
            f"--validation {number}: {run.folder} has {len(rows)} validation rows, counted from 0"
        )
    row: dict[str, Any] = rows.slice(number, 1).to_pylist()[0]
    return row


def pair_sums(number: int) -> str:
    """Return SQL as `sample_sums`, of one validation row alone."""
    return f"""
        SELECT
            sample_id, domain, block, count(pairwise)::INTEGER AS steps,
            min(step) AS first_step, max(step) AS last_step,
            fsum(r.lr * r.clip_factor * row_weight * pairwise[{number + 1}] * weight) AS value
        FROM scores r JOIN steps USING (run, step) GROUP BY sample_id, domain, block
    """


def find_extreme_pairs(database: ScoreDatabase, number: int, count: int) -> tuple[pa.Table, pa.Table]:
    """Return the `count` samples that helped a validation row most, and the `count` that hurt it most.

    Both have the columns of "samples" in a folder of values. The value is the pair's: the sum over steps of
    lr · clip factor · row weight · <∇ℓ_i, ∇ℓ_j>. Its mean over the validation rows is the value of
    the sample.
    """
    database.create("pairs", samples_sql(pair_sums(number)), "summing pairs")
    helped = highest_and_lowest(database.connection, "(FROM pairs WHERE value > 0)", "sample_id", count)[0]
    hurt = highest_and_lowest(database.connection, "(FROM pairs WHERE value < 0)", "sample_id", count)[1]
    return helped, hurt
