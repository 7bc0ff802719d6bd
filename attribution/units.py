"""The two kinds of units that have a value: samples and documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attribution.database import ScoreDatabase
from attribution.documents import write_documents
from attribution.scored_run import AttributionError
from attribution.values import write_tables
from data_processing.shards import Shard

Unit = Literal["samples", "documents"]
NUMBER = {"samples": "block", "documents": "document"}  # the column that names a unit within its domain


def write_units(database: ScoreDatabase, shards: Sequence[Shard], unit: Unit, folder: Path) -> Path:
    """Write the values of all samples or documents into `folder`, and return the file.

    Its columns are those in a folder of values. Raises as `write_tables`.
    """
    if unit == "documents" and not shards:
        raise AttributionError(
            f"{database.runs[0].folder}: its samples have no documents in them; take --unit samples"
        )
    write_tables(database, folder)
    samples = folder / "samples.parquet"
    if unit == "samples":
        return samples
    documents = folder / "documents.parquet"
    write_documents(samples, shards, database.runs[0].block_size, documents)
    return documents
