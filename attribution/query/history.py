"""Find the uses of a sample or document, step by step, and the rank of its value."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from attribution.database import ScoreDatabase, parquet
from attribution.documents import FIRST, divide_blocks, locate_document
from attribution.units import NUMBER, Unit
from data_processing.shards import Shard
from score_store.schema import WordSplit


@dataclass(frozen=True)
class Standing:
    """A value among those of all samples, or all documents."""

    value: float
    rank: int  # 1 is the highest; equal values share a rank
    count: int  # number of values
    lower: float  # share of the values that are lower


def find_standing(
    database: ScoreDatabase, units: Path, unit: Unit, domain: str, number: int
) -> Standing | None:
    """Return the standing of a unit, or None if it has no value. units: the file that `write_units` wrote."""
    table = parquet(units)
    own = f"SELECT value FROM {table} WHERE domain = ? AND {NUMBER[unit]} = ? AND value IS NOT NULL"
    found = database.query(own, f"looking among {unit}", [domain, number])["value"].to_pylist()
    if not found:
        return None
    counts = f"""
        SELECT
            count(*) FILTER (value > $1) AS higher, count(*) FILTER (value < $1) AS lower,
            count(value) AS count
        FROM {table}
    """
    row = database.query(counts, f"comparing {unit}", found).to_pylist()[0]
    return Standing(found[0], row["higher"] + 1, row["count"], row["lower"] / row["count"])


def find_block_uses(database: ScoreDatabase, domain: str, blocks: range) -> pa.Table:
    """Return the uses of these blocks by step: step, block, train_loss, lr, dot_product, value.

    dot_product and value are null where the optimizer skipped the step. Where the scores split values by word, there is
    also `parts`, in the unit of the value.
    """
    parts = ", [part * part_factor FOR part IN parts] AS parts" if database.by_word is not None else ""
    return database.query(
        f"SELECT step, block, train_loss, lr, dot_product, weighted_value AS value{parts} FROM scores "
        "WHERE domain::VARCHAR = ? AND block BETWEEN ? AND ? ORDER BY step, block",
        "looking for uses",
        [domain, blocks.start, blocks.stop - 1],
    )


def find_blocks(shard: Shard, document: int, block_size: int, by_word: WordSplit | None = None) -> range:
    """Return the blocks that have targets in a document, or with a split by position inputs.

    Block b's targets are tokens bT+1 to bT+T, its inputs tokens bT to bT+T-1. The shard's first token, and those after
    the last whole block, are targets of no block.
    """
    first, stop = locate_document(shard, document)
    blocks = (shard.num_tokens - 1) // block_size
    offset = FIRST[by_word]
    return range(max(first - offset, 0) // block_size, min((stop - 1 - offset) // block_size + 1, blocks))


def find_document_uses(database: ScoreDatabase, shard: Shard, document: int, block_size: int) -> pa.Table:
    """Return the uses of a document's blocks, as `find_block_uses`, with one more column.

    `share` is the document's share of the block's targets (by position: inputs); `value` is its part of the block's
    value, as in a table of documents.
    """
    by_word = database.by_word
    blocks = find_blocks(shard, document, block_size, by_word)
    found = find_block_uses(database, shard.domain, blocks)
    pairs = divide_blocks(shard, block_size, found["block"].to_numpy(), by_word)
    parts = None if by_word is None else found["parts"].combine_chunks()
    own = pairs.documents == document  # once for each block
    value = pa.array(pairs.divide(found["value"].to_numpy(), parts)[own], from_pandas=True)
    return found.set_column(found.schema.get_field_index("value"), "value", value).append_column(
        "share", pa.array(pairs.shares[own])
    )
