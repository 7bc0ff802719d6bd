"""The two kinds of units that have a value: samples and documents."""

from pathlib import Path
from typing import Literal

from attribution.database import ScoreDatabase
from attribution.errors import AttributionError
from attribution.samples import Samples
from attribution.values import write_tables

Unit = Literal["samples", "documents"]
NUMBER = {"samples": "block", "documents": "document"}  # the column that names a unit within its domain


def write_units(database: ScoreDatabase, samples: Samples, unit: Unit, folder: Path) -> Path:
    """Write the values of all samples or documents into `folder`, and return the file.

    Its columns are those in a folder of values. Raises as `write_tables`.
    """
    if unit == "documents" and samples.documents is None:
        raise AttributionError(
            f"{database.runs[0].folder}: its samples have no documents in them; take --unit samples"
        )
    write_tables(database, samples, folder)
    if unit == "documents":
        samples.write_documents(folder, database.by_word)
    return folder / f"{unit}.parquet"
