"""The samples of a run that are not blocks of shards, kept beside its scores: what the tools show of them.

    {result_dir}/samples/part-000000.parquet    sample_id, group, text, tokens, metadata

A sample is there once, under the id that its scores have. metadata is a JSON object; "image" in it is the path of
the sample's image below the folder of images.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from foundation.errors import file_errors
from foundation.files import written_whole
from score_store.schema import ScoreError

KEPT = "kept"  # in the metadata of the scores of a run that keeps its samples, under "samples"
IMAGES = "images"  # folder beside the records
PART = "part-000000.parquet"
ROWS = 4096  # written at a time
SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "group": pa.string(),
        "text": pa.string(),
        "tokens": pa.list_(pa.int32()),  # as the model gets them, without padding
        "metadata": pa.string(),
    },
    metadata={"format": "ghostEngines samples", "format_version": "1"},
)


@dataclass(frozen=True)
class Sample:
    """One sample, as the tools show it."""

    sample_id: int
    group: str
    text: str
    tokens: Sequence[int]  # as the model gets them, without padding
    metadata: dict[str, Any] = field(default_factory=dict)


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Write the folder, whole or not at all. It must not be there.

    Raises:
        ScoreError: an id is there twice.
        UserError: it cannot be written.
    """
    coming, seen = iter(samples), set()
    with file_errors(folder), written_whole(folder) as hidden:
        hidden.mkdir()
        with pq.ParquetWriter(hidden / PART, SCHEMA, compression="zstd") as writer:
            while rows := list(islice(coming, ROWS)):
                for row in rows:
                    if row.sample_id in seen:
                        raise ScoreError(f"{folder}: sample id {row.sample_id} is there twice")
                    seen.add(row.sample_id)
                columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names[:-1]}
                columns["metadata"] = [json.dumps(row.metadata) for row in rows]
                writer.write_table(pa.table(columns, schema=SCHEMA))


def open_samples(folder: Path) -> ds.Dataset:
    """Return the samples of a folder. Raises ScoreError if it is missing, damaged or of another version."""
    with file_errors(folder, ScoreError):
        if not folder.is_dir():
            raise ScoreError(f"{folder} is missing: copy the run's folder again")
        try:
            found = ds.dataset(sorted(folder.glob("*.parquet")), format="parquet")
        except (pa.ArrowInvalid, ValueError) as error:
            raise ScoreError(f"{folder} is damaged ({error}): copy the run's folder again") from error
    if found.schema != SCHEMA or found.schema.metadata != SCHEMA.metadata:
        raise ScoreError(
            f"{folder} holds other columns than {SCHEMA.names}: another version of this program wrote it"
        )
    return found
