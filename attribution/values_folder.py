"""A folder of values on disk: what its files hold (FILES), reading one, writing one whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from attribution.database import parquet
from attribution.documents import DOCUMENT_SCHEMA
from attribution.scored_run import AttributionError
from foundation.errors import file_errors
from foundation.files import lock

FORMAT = {"format": "attribution values", "format_version": 1}
MANIFEST = "values.json"  # the format, how the values were made, and of which runs
FILES = {
    # sorted by sample_id
    "samples": {
        "sample_id": "int64",
        "domain": "string",
        "block": "int64",
        "value": "double",  # null: no step gave it one
        "steps": "int32",  # how many did, of all runs
        "first_step": "int64",  # in which it was used
        "last_step": "int64",
    },
    # those that a used sample touches, sorted by domain and document
    "documents": {field.name: str(field.type) for field in DOCUMENT_SCHEMA},
    # those that a used sample is of, the highest mean value first
    "domains": {
        "domain": "string",
        "samples": "int64",  # distinct
        "uses": "int64",  # that gave a value
        "value": "double",  # sum
        "mean_value": "double",  # of the samples
        "share_negative": "double",  # of the samples
        "share_of_absolute": "double",  # of the sum of the samples' |value|
    },
    # not normalised, whatever `normalise` says
    "steps": {
        "run": "int32",  # in the order of the runs
        "step": "int64",
        "lr": "double",
        "clip_factor": "double",
        "train_loss": "double",  # mean of the step's samples
        "val_loss": "double",  # before the step
        "predicted": "double",  # Σ values: the fall of val_loss that they predict; null: the step has none
        "absolute": "double",  # Σ |values|
        "measured": "double",  # val_loss minus that of the next step; null in the last
        "rows": "int64",
    },
}
KEYS = {"samples": "sample_id", "documents": "domain, document", "domains": "domain"}


@dataclass(frozen=True)
class Values:
    """A folder of values. manifest: what its values.json holds."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads the manifest and the files' schemas.

        Raises:
            AttributionError: not a folder of values, one of another version, or a file of it is missing or
            not the one that was written.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for name, columns in FILES.items():
            path = folder / f"{name}.parquet"
            if not path.is_file():
                raise AttributionError(
                    f"{path} is missing; make the values again: python -m attribution.values"
                )
            with pq.ParquetFile(path) as file:
                seen = {field.name: str(field.type) for field in file.schema_arrow}
                rows = file.metadata.num_rows
            if seen != columns or rows != manifest["rows"][name]:
                raise AttributionError(
                    f"{path} has {rows} rows of {seen}, not {manifest['rows'][name]} of {columns}; make the "
                    "values again: python -m attribution.values"
                )
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        """The file of "samples", "documents", "domains" or "steps"."""
        assert name in FILES, name
        return self.folder / f"{name}.parquet"

    def read(self, name: str) -> pa.Table:
        """The whole table: of samples and documents as large as the data."""
        return pq.read_table(self.path(name))

    def extremes(self, name: str, count: int) -> tuple[pa.Table, pa.Table]:
        """Of "samples", "documents" or "domains", the `count` rows with the highest and those with the lowest
        value, beginning with the most extreme one."""
        with duckdb.connect() as connection:
            source = parquet(self.path(name))
            return highest_and_lowest(connection, source, KEYS[name], count)


def read_manifest(folder: Path) -> dict[str, Any]:
    """AttributionError if the folder has none of this version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AttributionError(
            f"{folder} is not a folder of values: it has no {MANIFEST}; make one with python -m "
            "attribution.values"
        ) from error
    except ValueError as error:
        raise AttributionError(f"{path} is not JSON ({error}): make the values again") from error
    seen = {key: manifest.get(key) for key in FORMAT} if isinstance(manifest, dict) else manifest
    if seen != FORMAT:
        raise AttributionError(f"{path} is of {seen}, this program reads {FORMAT}: make the values again")
    return manifest


def highest_and_lowest(
    connection: duckdb.DuckDBPyConnection, source: str, key: str, count: int
) -> tuple[pa.Table, pa.Table]:
    """As `Values.extremes`. source: of rows with a value, in SQL; key: the columns that tell them apart."""
    highest, lowest = (
        connection.sql(
            f"SELECT * FROM {source} WHERE value IS NOT NULL ORDER BY value {order}, {key} LIMIT {count}"
        ).to_arrow_table()
        for order in ("DESC", "ASC")
    )
    return highest, lowest


@contextmanager
def being_written(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, of this process alone, that takes its place at the end; after an
    exception it is removed. What an older program left there is removed, too.

    Raises:
        AttributionError: there is something else than values; it cannot be written, or another process
        does.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        read_manifest(folder)
    folder = folder.resolve()
    unfinished, older = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "older"))
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AttributionError(
            f"cannot make {folder} ({error.strerror}); name a folder that can be written, with --output"
        ) from error
    with locked(unfinished):
        for entry in unfinished.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            with file_errors(f"{folder}: nothing was written", AttributionError):
                yield unfinished
        except BaseException:
            shutil.rmtree(unfinished)
            raise
        if older.exists():
            shutil.rmtree(older)
        if folder.exists():
            folder.rename(older)
        unfinished.rename(folder)
        if older.exists():
            shutil.rmtree(older)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    except BlockingIOError as error:
        raise AttributionError(f"{folder}: another process writes values there; wait for it") from error
    finally:
        os.close(descriptor)
