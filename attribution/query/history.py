"""What a sample or a document did over a run: its uses, step by step, and its place among all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from attribution.database import ScoreDatabase, parquet
from attribution.documents import bounds, shares
from attribution.units import NUMBER, Unit
from data_processing.blocks import BLOCK_BITS
from data_processing.shards import Shard


@dataclass(frozen=True)
class Standing:
    """A value among those of all samples, or all documents. rank: 1 is the highest, equal values have the
    same; count: how many there are; lower: what share of them is lower."""

    value: float
    rank: int
    count: int
    lower: float


def standing(database: ScoreDatabase, units: Path, unit: Unit, domain: str, number: int) -> Standing | None:
    """units: as `write_units` wrote it. None for a unit without a value."""
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


def uses(database: ScoreDatabase, shards: Sequence[Shard], domain: str, blocks: range) -> pa.Table:
    """The steps in which these blocks were used: step, block, train_loss, lr, dot_product, value; by step.

    dot_product and value are null where the optimizer skipped the step. shards: those of the run's `domains`.
    """
    first = [shard.domain for shard in shards].index(domain) << BLOCK_BITS
    return database.query(
        "SELECT step, block, train_loss, lr, dot_product, weighted_value AS value FROM scores "
        "WHERE sample_id BETWEEN ? AND ? ORDER BY step, block",
        "looking for uses",
        [first + blocks.start, first + blocks.stop - 1],
    )


def blocks_of(shard: Shard, document: int, block_size: int) -> range:
    """The blocks with targets in a document. Block b's are tokens bT+1 to bT+T; what is after the last whole
    block is in none, and so is a shard's first token."""
    first, stop = (int(place) for place in bounds(shard, np.int64(document)))
    blocks = (shard.num_tokens - 1) // block_size
    return range(max(first - 1, 0) // block_size, min((stop - 2) // block_size + 1, blocks))


def document_uses(database: ScoreDatabase, shards: Sequence[Shard], shard: Shard, document: int) -> pa.Table:
    """As `uses`, with one more column, `share`: of the block's targets, those in the document. `value` is
    that share of the block's value."""
    block_size = database.runs[0].block_size
    found = uses(database, shards, shard.domain, blocks_of(shard, document, block_size))
    _, documents, parts = shares(shard, block_size, found["block"].to_numpy())
    share = parts[documents == document]  # a block has one part in the document
    value = pa.array(found["value"].to_numpy() * share, from_pandas=True)
    return found.set_column(found.schema.get_field_index("value"), "value", value).append_column(
        "share", pa.array(share)
    )
