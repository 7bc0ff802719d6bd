"""Find what a query names: a text, a training sample, or a validation row and the samples that helped it."""

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from attribution.database import ScoreDatabase
from attribution.query.text_search import Place, find_documents
from attribution.samples import Samples, StoredSamples
from attribution.scored_run import AttributionError, ScoredRun
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
    found, total = samples.find(text, count)
    if not found:
        raise AttributionError(
            f"--text: none of the {samples.table.count_rows():,} training samples contains it; every letter counts, "
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


def find_sample(run: ScoredRun, samples: Samples, sample: str) -> tuple[str, int]:
    """Return the domain and number of DOMAIN:BLOCK. Raises AttributionError if there is no such sample."""
    domain, _, number = sample.rpartition(":")
    if re.fullmatch(r"[0-9]+", number) is None:
        raise AttributionError(f"--sample {sample!r}: give DOMAIN:BLOCK, as in '{run.domains[0]}:0'")
    if isinstance(samples, StoredSamples):
        try:
            samples.excerpt(domain, int(number), 1)
        except LookupError as error:
            raise AttributionError(f"--sample {sample!r}: {error}") from error
        return domain, int(number)
    shards = samples.shards
    by_name = {shard.domain: shard for shard in shards}
    if domain not in by_name:
        raise AttributionError(
            f"--sample {sample!r}: there is no domain {domain!r} in {shards[0].path.parent}, but "
            f"{', '.join(by_name)}"
        )
    blocks = (by_name[domain].num_tokens - 1) // run.block_size
    if int(number) >= blocks:
        raise AttributionError(
            f"--sample {sample!r}: {domain!r} has {blocks} blocks of {run.block_size} tokens, counted from 0"
        )
    return domain, int(number)


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
    """Return SQL for sample_id, value, steps, first_step, last_step of each sample, of one validation row alone."""
    return f"""
        SELECT
            sample_id, count(pairwise)::INTEGER AS steps, min(step) AS first_step, max(step) AS last_step,
            fsum(r.lr * r.clip_factor * pairwise[{number + 1}] / global_batch_size * weight) AS value
        FROM scores r JOIN steps USING (run, step) GROUP BY sample_id
    """


def find_extreme_pairs(database: ScoreDatabase, number: int, count: int) -> tuple[pa.Table, pa.Table]:
    """Return the `count` samples that helped a validation row most, and the `count` that hurt it most.

    Both have the columns of "samples" in a folder of values. The value is the pair's: the sum over steps of
    lr · clip factor · <∇ℓ_i, ∇ℓ_j> / global batch size. Its mean over the validation rows is the value of
    the sample.
    """
    database.create("pairs", samples_sql(database, pair_sums(number)), "summing pairs")
    helped = highest_and_lowest(database.connection, "(FROM pairs WHERE value > 0)", "sample_id", count)[0]
    hurt = highest_and_lowest(database.connection, "(FROM pairs WHERE value < 0)", "sample_id", count)[1]
    return helped, hurt
