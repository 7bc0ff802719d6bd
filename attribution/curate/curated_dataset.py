"""Write the samples of any loop that are kept as a data set: Parquet files as `datasets.load_dataset` reads them.

    OUTPUT/data/train-00000-of-00001.parquet    id, group, text, tokens, and a column for each key of the metadata

A sample keeps its id, so that the values of a run on the result can be compared with those of this one. A key whose
values are lists, dicts, of several types, or numbers that no column holds exactly, becomes strings of JSON, but strings
among them stay as they are.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attribution.curate.drop_rule import Choice, describe_domain, read_dropped_ids
from attribution.errors import AttributionError
from attribution.samples import StoredSamples
from foundation.progress import progress_bar

FILE = Path("data", "train-00000-of-00001.parquet")
COLUMNS = {
    "sample_id": "id",
    "group": "group",
    "text": "text",
    "tokens": "tokens",
}  # of SCHEMA: in the data set
INTEGER = "integer of 64 bits"  # larger than a float holds
# The values that a column of each type has, the first that fits first; strings of JSON where none does.
TYPES: tuple[tuple[set[type | str], pa.DataType], ...] = (
    ({str}, pa.string()),
    ({bool}, pa.bool_()),
    ({int, INTEGER}, pa.int64()),
    ({int, float}, pa.float64()),
)


def write_dataset(target: Path, samples: StoredSamples, choice: Choice, dropped: Path) -> dict[str, Any]:
    """Write the samples that stay, and return what became of each group.

    Memory does not grow with the samples' texts.

    Args:
        dropped: the file that `choose` wrote.

    Raises:
        AttributionError: no sample is left, or a key of the metadata is the name of a column.
    """
    gone = read_dropped_ids(dropped)
    types = metadata_types(samples)
    schema = pa.schema(
        {
            "id": pa.int64(),
            "group": pa.string(),
            "text": pa.string(),
            "tokens": pa.list_(pa.int32()),
            **types,
        }
    )
    units: Counter[str] = Counter()
    kept = 0
    (target / FILE).parent.mkdir()
    with (
        pq.ParquetWriter(target / FILE, schema, compression="zstd") as writer,
        progress_bar("writing samples", len(samples.rows), "samples") as bar,
    ):
        for table in samples.tables():
            units.update(table["group"].to_pylist())
            stays = table.filter(~np.isin(table["sample_id"].to_numpy(), gone))
            kept += len(stays)
            if len(stays):
                writer.write_table(as_dataset(stays, schema, types))
            bar.update(len(table))
    if not kept:
        raise AttributionError(f"--drop: no sample would be left ({choice.reason}); choose fewer")
    return {domain: describe_domain(choice, domain, count) for domain, count in sorted(units.items())}


def as_dataset(table: pa.Table, schema: pa.Schema, types: dict[str, pa.DataType]) -> pa.Table:
    """Return rows of stored samples with the columns of the data set."""
    metadata = [json.loads(row) for row in table["metadata"].to_pylist()]
    columns = {name: table[own] for own, name in COLUMNS.items()}
    for key, kind in types.items():
        values = [row.get(key) for row in metadata]
        if kind == pa.string():
            values = [
                value if value is None or isinstance(value, str) else json.dumps(value) for value in values
            ]
        columns[key] = pa.array(values, kind)
    return pa.table(columns, schema=schema)


def metadata_types(samples: StoredSamples) -> dict[str, pa.DataType]:
    """Return the keys of all metadata, sorted, with their types: a string of JSON where they are of several.

    Raises:
        AttributionError: a key is the name of another column.
    """
    found: dict[str, set[type | str]] = {}
    for table in samples.tables(["metadata"]):
        for text in table["metadata"].unique().to_pylist():
            for key, value in json.loads(text).items():
                found.setdefault(key, set()).update([] if value is None else [kind_of(value)])
    if taken := sorted(found.keys() & set(COLUMNS.values())):
        raise AttributionError(
            f"{samples.rows.folders[0]}: {', '.join(taken)} in the metadata of samples is the name of a column of the "
            "data set, too; write the run with another name"
        )
    return {
        key: next((kind for held, kind in TYPES if found[key] <= held), pa.string()) for key in sorted(found)
    }


def kind_of(value: Any) -> type | str:
    """Return the type of a value of the metadata; of an integer that a float or a column does not hold, its name."""
    if type(value) is int and abs(value) > 1 << 53:
        return INTEGER if -(1 << 63) <= value < 1 << 63 else "larger integer"
    return type(value)
