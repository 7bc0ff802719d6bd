"""Split the values of samples by word: sum the parts that the scores have of each use.

There are two splits, and a value is the sum of its parts in either. "target": part t is what the target of position t
did, which is the token after it (the column `target_value` of a run with exact values and --exact_by_target).
"position": part t is what the weights' uses at position t did (the column `token` of a run with --score_granularity
token, whose values are those in pass).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attribution.database import ScoreDatabase
from attribution.errors import AttributionError
from attribution.scored_run import ScoredRun
from foundation.progress import progress_bar
from score_store.samples import OWN
from score_store.schema import WordSplit

ROUNDING = 1e-9  # of a value's distance from the sum of its parts, relative to the sum of their sizes

WORD_SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "domain": pa.string(),
        "block": pa.int64(),
        "value": pa.float64(),  # the sum of the parts, as in "samples"
        # in the unit of the value; null: no use has any
        "parts": pa.list_(pa.field("element", pa.float64())),
    }
)
# The uses of each sample together. Their order makes sums the same each time.
USES = """
    SELECT sample_id, domain::VARCHAR AS domain, block, weighted_value, part_factor, parts
    FROM scores ORDER BY sample_id, run, step
"""
# What the parts are, for readers.
DESCRIBED: dict[WordSplit | None, str] = {
    "target": "by target: what each word, as a target, did",
    "position": "by position: where a weight was used",
    None: "no split by word",
}
# What a block's value is divided by, among its documents.
DIVIDED: dict[WordSplit | None, str] = {
    "target": "by target: a document has the parts of its own tokens as targets",
    "position": "by position: a document has the parts of the positions that its tokens are at, which is where weights "
    "were used, and not what its words as targets did",
    None: "by their numbers of target tokens, because the scores have no split of a value by word",
}

# What to ask for, by target and by position, by whether a loop wrote the run that is not main.py's.
REMEDIES = {
    False: ("train with --values exact --exact_by_target", "with --score_granularity token"),
    True: (
        "ask for Scoring(every_exact=True, by_target=True) in a scored Trainer, or for "
        'write_run(values="exact", by_target=True) in a loop of one’s own',
        'for granularity="token" in either',
    ),
}


def why_none(runs: Sequence[ScoredRun]) -> str:
    """Return, in words, why the values of these runs have no common split, and how to get one."""
    if len({run.by_word for run in runs}) > 1:
        return "the runs have different ones"
    target, position = REMEDIES[runs[0].metadata.get("samples") == OWN]
    if runs[0].exact and runs[0].granularity == "token":
        return f"scores by position split values in pass, and these are exact: {target}"
    return f"{target}, or {position}"


def write_words(database: ScoreDatabase, target: Path) -> None:
    """Write the summed parts of every sample, with WORD_SCHEMA, sorted by sample_id.

    DuckDB sorts the uses on the disk, and equal ids are added up as they come: 10^6 uses of 256 parts take two minutes
    and, with a memory limit of 1 GB, 1.6 GB of memory. (Grouping by sample and position would hold every part.)

    Raises:
        AttributionError: the parts of a use do not add up to its value; the uses of a sample have different numbers
            of parts, and not only because its batches were padded at the end.
    """
    uses = target.with_name("uses.parquet")
    database.write(USES, uses, "sorting parts of values", rows=2048)
    with (
        pq.ParquetFile(uses) as file,
        pq.ParquetWriter(target, WORD_SCHEMA, compression="zstd") as writer,
        progress_bar("adding parts of values", file.metadata.num_rows, "uses") as bar,
    ):
        for table in whole_samples(file):
            writer.write_table(_sum_uses(table, len(database.runs)))
            bar.update(len(table))
    uses.unlink()


def whole_samples(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """Yield a file that is sorted by sample_id in pieces, each with all uses of its samples."""
    rest = None
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        if rest is not None:
            table = pa.concat_tables([rest, table])
        ids = table["sample_id"].to_numpy()
        last = int(np.searchsorted(ids, ids[-1]))  # the next piece may have more uses of this sample
        if last > 0:
            yield table.slice(0, last)
        rest = table.slice(last)
    if rest is not None:
        yield rest


def _sum_uses(uses: pa.Table, runs: int) -> pa.Table:
    """Return the rows of WORD_SCHEMA of some samples, all of whose uses are here."""
    ids = uses["sample_id"].to_numpy()
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    sample = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ids)))  # of each use
    values = uses["weighted_value"].to_numpy()
    has_value = ~np.isnan(values)
    parts = uses["parts"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(parts), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    factors = np.nan_to_num(uses["part_factor"].to_numpy())
    flat = parts.flatten().to_numpy(zero_copy_only=False) * np.repeat(factors, lengths)
    _check_sums(ids, values, flat, lengths)

    longest = np.zeros(len(starts), np.int64)
    np.maximum.at(longest, sample, lengths)
    offsets = np.append(0, longest.cumsum())
    position = np.arange(len(flat)) - np.repeat(lengths.cumsum() - lengths, lengths)
    place = np.repeat(offsets[sample], lengths) + position
    sums = np.bincount(place, flat, minlength=offsets[-1]) / runs
    kept = _common_lengths(ids[starts], sample, lengths, flat, position)
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], longest) < np.repeat(kept, longest)
    cuts = pa.array(np.append(0, kept.cumsum()), pa.int32(), mask=np.append(kept == 0, False))
    total = np.bincount(sample, np.where(has_value, values, 0), minlength=len(starts)) / runs
    valued = np.bincount(sample, has_value, minlength=len(starts)) > 0
    columns: dict[str, Any] = {name: uses[name].take(starts) for name in ("sample_id", "domain", "block")}
    columns["value"] = pa.array(total, mask=~valued)
    columns["parts"] = pa.ListArray.from_arrays(cuts, sums[inside])
    return pa.table(columns, schema=WORD_SCHEMA)


def _check_sums(
    ids: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    flat: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.int64],
) -> None:
    """Raise AttributionError if the parts of a use are not those of its value, (n,) NaN for none."""
    use = np.repeat(np.arange(len(lengths)), lengths)
    sums, sizes = (np.bincount(use, each, minlength=len(lengths)) for each in (flat, np.abs(flat)))
    wrong = np.flatnonzero(np.abs(sums - np.nan_to_num(values)) > ROUNDING * sizes + 1e-300)
    if len(wrong):
        raise AttributionError(
            f"sample {ids[wrong[0]]} has a value of {values[wrong[0]]:.6g}, and parts that add up to "
            f"{sums[wrong[0]]:.6g}: the scores are damaged; copy the folder again, or repeat the run"
        )


def _common_lengths(
    ids: npt.NDArray[np.int64],
    sample: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    flat: npt.NDArray[np.float64],
    position: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return how many parts all uses of each sample have, 0 if none has any.

    A batch that is padded to its longest row has more, which are exactly zero.

    Raises:
        AttributionError: a use has others beyond those of another one.
    """
    shortest = np.full(len(ids), np.iinfo(np.int64).max)
    some = lengths > 0
    np.minimum.at(shortest, sample[some], lengths[some])
    of_part = np.repeat(sample, lengths)
    beyond = (position >= shortest[of_part]) & (flat != 0)
    if beyond.any():
        number = int(of_part[np.argmax(beyond)])
        found = sorted(set(lengths[(sample == number) & some].tolist()))
        raise AttributionError(
            f"sample {ids[number]} has different numbers of parts in different steps, {', '.join(map(str, found))}, "
            "and not of padding at the end: pad batches on the right, and give a sample the same tokens in all steps"
        )
    return np.where(shortest == np.iinfo(np.int64).max, 0, shortest)


def read_parts(words: Path, sample_ids: Sequence[int]) -> dict[int, list[float]]:
    """Return the parts of those samples that have any, by id."""
    named = [("sample_id", "in", list(sample_ids))]
    # A folder named a=b is no column.
    table = pq.read_table(words, columns=["sample_id", "parts"], filters=named, partitioning=None)
    table = table.filter(pc.is_valid(table["parts"]))
    return dict(zip(table["sample_id"].to_pylist(), table["parts"].to_pylist(), strict=True))
