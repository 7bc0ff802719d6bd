"""Read and write a folder of values. FILES documents its tables."""

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

from attribution.audit import COLUMNS
from attribution.database import parquet
from attribution.documents import DOCUMENT_SCHEMA
from attribution.errors import AttributionError
from attribution.words import WORD_SCHEMA
from foundation.errors import file_errors
from foundation.files import lock
from score_store.schema import WordSplit

FORMAT = {"format": "attribution values", "format_version": 3}
MANIFEST = "values.json"  # the format, the options and the runs that the values were computed from
FILES = {
    # sorted by sample_id
    "samples": {
        "sample_id": "int64",
        "domain": "string",
        "block": "int64",
        "value": "double",  # null: no step gave it a value
        "steps": "int32",  # number of steps that gave it a value, in all runs
        "first_step": "int64",  # in which it was used
        "last_step": "int64",
    },
    # the documents in used samples, sorted by domain and document
    "documents": {field.name: str(field.type) for field in DOCUMENT_SCHEMA},
    # the domains of used samples, the highest mean value first
    "domains": {
        "domain": "string",
        "samples": "int64",  # distinct
        "uses": "int64",  # number of uses that gave a value
        "value": "double",  # sum
        "mean_value": "double",  # of the samples
        "share_negative": "double",  # of the samples
        "share_of_absolute": "double",  # of the sum of the samples' |value|
    },
    # never normalised
    "steps": {
        "run": "int32",  # in the order of the runs
        "step": "int64",
        "lr": "double",
        "clip_factor": "double",
        "train_loss": "double",  # mean of the step's samples
        "val_loss": "double",  # before the step
        "predicted": "double",  # Σ values: the fall of val_loss by this batch; null: the step has no values
        "absolute": "double",  # Σ |values|
        "measured": "double",  # val_loss minus that of the next step; null in the last
        "rows": "int64",
    },
    "audit": COLUMNS,  # of each run and phase of training
}
# of the samples, where the scores have their split by word: with their parts, sorted by sample_id
WORDS = {"words": {field.name: str(field.type) for field in WORD_SCHEMA}}
KEYS = {"samples": "sample_id", "documents": "domain, document", "domains": "domain"}


@dataclass(frozen=True)
class Values:
    """A folder of values."""

    folder: Path
    manifest: dict[str, Any]  # its values.json

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read the manifest and the files' schemas.

        Raises:
            AttributionError: the folder has no values, or those of another version; a file is missing or does
                not match the manifest.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for name, columns in files_of(manifest["by_word"]).items():
            path = folder / f"{name}.parquet"
            if not path.is_file():
                raise AttributionError(
                    f"{path} is missing; recompute the values: python -m attribution.values"
                )
            with pq.ParquetFile(path) as file:
                seen = {field.name: str(field.type) for field in file.schema_arrow}
                rows = file.metadata.num_rows
            if seen != columns or rows != manifest["rows"][name]:
                raise AttributionError(
                    f"{path} has {rows} rows of {seen}, not {manifest['rows'][name]} of {columns}; recompute "
                    "the values: python -m attribution.values"
                )
        return cls(folder, manifest)

    @property
    def by_word(self) -> WordSplit | None:
        """The split of values by word, which "words" has; None: there is none."""
        found: WordSplit | None = self.manifest["by_word"]
        return found

    def path(self, name: str) -> Path:
        """Return the path of "samples", "documents", "domains", "steps", "audit" or "words"."""
        assert name in files_of(self.by_word), name
        return self.folder / f"{name}.parquet"

    def read(self, name: str) -> pa.Table:
        """Return a whole table, in memory. Samples and documents may be too many for that."""
        return pq.read_table(self.path(name))

    def extremes(self, name: str, count: int) -> tuple[pa.Table, pa.Table]:
        """Return the `count` rows with the highest and with the lowest value, the most extreme first.

        Args:
            name: "samples", "documents" or "domains".
        """
        with duckdb.connect() as connection:
            source = parquet(self.path(name))
            return highest_and_lowest(connection, source, KEYS[name], count)


def files_of(by_word: WordSplit | None) -> dict[str, dict[str, str]]:
    """Return the tables of a folder with this split of values by word: the columns of each."""
    return FILES if by_word is None else FILES | WORDS


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest. Raises AttributionError if it has none of this version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AttributionError(
            f"{folder} is not a folder of values: it has no {MANIFEST}; make one with python -m "
            "attribution.values"
        ) from error
    except ValueError as error:
        raise AttributionError(f"{path} is not JSON ({error}): recompute the values") from error
    seen = {key: manifest.get(key) for key in FORMAT} if isinstance(manifest, dict) else manifest
    if seen != FORMAT:
        raise AttributionError(f"{path} is of {seen}, this program reads {FORMAT}: recompute the values")
    assert isinstance(manifest, dict)
    return manifest


def highest_and_lowest(
    connection: duckdb.DuckDBPyConnection, source: str, key: str, count: int
) -> tuple[pa.Table, pa.Table]:
    """Return the `count` rows with the highest and with the lowest value, as `Values.extremes`.

    Args:
        source: SQL for a table with a column `value`.
        key: the columns that identify a row; they order equal values.
    """
    highest, lowest = (
        connection.sql(
            f"SELECT * FROM {source} WHERE value IS NOT NULL ORDER BY value {order}, {key} LIMIT {count}"
        ).to_arrow_table()
        for order in ("DESC", "ASC")
    )
    return highest, lowest


@contextmanager
def being_written(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder`, which replaces it when the block ends.

    The hidden folder is locked by this process. After an exception it is removed. Leftovers of a killed
    process are removed, too.

    Raises:
        AttributionError: `folder` holds something else than values, cannot be written, or is being written by
            another process.
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
    """Hold the folder's lock during the block. Raises AttributionError if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    except BlockingIOError as error:
        raise AttributionError(f"{folder}: another process writes values there; wait for it") from error
    finally:
        os.close(descriptor)
