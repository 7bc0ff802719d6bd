"""From the scores of a run to the values of its samples, documents and domains.

    python -m attribution.values RESULT_DIR [RESULT_DIR ...] [--normalise none|absolute|predicted]
        [--steps FIRST:LAST] [--output FOLDER] [--pile_data_dir D] [--memory_limit 4GB]

A sample's value is the sum of its values over the steps in which it was used: the first-order In-Run Data
Shapley value (Wang et al., arXiv 2406.11011). Of several runs, the mean of the runs' sums, with 0 for a run
that did not use the sample. What the files of a folder of values hold is written at FILES.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.completeness import Window
from attribution.database import MEMORY_LIMIT, Normalise, ScoreDatabase, quoted
from attribution.documents import DOCUMENT_SCHEMA, write_documents
from attribution.scored_run import AttributionError, ScoredRun
from data_processing.shards import write_json_atomically
from dataloader import BLOCK_BITS

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


def write_values(
    runs: Sequence[ScoredRun],
    folder: Path,
    *,
    normalise: Normalise = "none",
    steps: Window = (None, None),
    memory_limit: str = MEMORY_LIMIT,
    pile_data_dir: Path | None = None,
) -> Values:
    """Writes a folder of values, which appears whole and takes the place of an older one.

    normalise, steps, memory_limit: as of `ScoreDatabase`. pile_data_dir: the splits' folder; None: as in the
    first run.

    Raises:
        AttributionError: what `ScoreDatabase`, `ScoredRun.shards` raise; values that are not finite; the
        folder is something else, or another process writes it.
        ShardError: what `ScoredRun.shards` raises.
    """
    shards = runs[0].shards(pile_data_dir)
    with being_written(folder) as unfinished:
        with ScoreDatabase(
            runs, memory_limit=memory_limit, steps=steps, normalise=normalise, spill_folder=unfinished
        ) as database:
            check_finite(database)
            write_tables(database, unfinished)
            windows = database.windows
        write_documents(
            unfinished / "samples.parquet", shards, runs[0].block_size, unfinished / "documents.parquet"
        )
        manifest = {
            **FORMAT,
            "normalise": normalise,
            "runs": [description(run, window) for run, window in zip(runs, windows, strict=True)],
            "rows": {name: pq.read_metadata(unfinished / f"{name}.parquet").num_rows for name in FILES},
        }
        write_json_atomically(unfinished / MANIFEST, manifest)
    return Values.open(folder)


def description(run: ScoredRun, window: tuple[int, int]) -> dict[str, Any]:
    """What the manifest says of a run."""
    return {
        "folder": str(run.folder.resolve()),
        "steps": window,
        "block_size": run.block_size,
        "split": run.metadata["split"],
        "domains": run.domains,
        "shard_sha256": run.checksums,
        "validation_sha256": run.metadata["validation_sha256"],
    }


def sample_sums(database: ScoreDatabase) -> str:
    """SQL: sample_id, value, steps, first_step, last_step of each sample, in no order."""
    return f"""
        SELECT
            sample_id, sum(weighted_value) / {len(database.runs)} AS value,
            count(weighted_value)::INTEGER AS steps, min(step) AS first_step, max(step) AS last_step
        FROM scores GROUP BY sample_id
    """


def samples_sql(database: ScoreDatabase, sums: str) -> str:
    """SQL: the columns of "samples" for the rows of `sums`, in their order."""
    domains = ", ".join(map(quoted, database.runs[0].domains))
    return f"""
        SELECT
            sample_id, [{domains}][(sample_id >> {BLOCK_BITS}) + 1] AS domain,
            sample_id & {(1 << BLOCK_BITS) - 1} AS block, value, steps, first_step, last_step
        FROM ({sums})
    """


def write_tables(database: ScoreDatabase, folder: Path) -> None:
    """All but the documents."""
    sums = f"{sample_sums(database)} ORDER BY sample_id"
    samples = folder / "samples.parquet"
    database.write(samples_sql(database, sums), samples, "summing samples")
    domains = f"""
        SELECT
            domain, count(*) AS samples, sum(steps)::BIGINT AS uses, sum(value) AS value,
            avg(value) AS mean_value, count_if(value < 0) / count(value) AS share_negative,
            sum(abs(value)) / sum(sum(abs(value))) OVER () AS share_of_absolute
        FROM read_parquet({quoted(samples)}) GROUP BY domain ORDER BY mean_value DESC NULLS LAST, domain
    """
    database.write(domains, folder / "domains.parquet", "summing domains")
    columns = ", ".join(FILES["steps"])
    database.write(
        f"SELECT {columns} FROM steps ORDER BY run, step", folder / "steps.parquet", "writing steps"
    )


def check_finite(database: ScoreDatabase) -> None:
    """AttributionError if a step has values that are not finite: all sums would be."""
    sql = "SELECT run, step FROM steps WHERE NOT isfinite(absolute) ORDER BY step, run LIMIT 1"
    for row in database.query(sql, "looking for values that are not finite").to_pylist():
        raise AttributionError(
            f"{database.runs[row['run']].folder} has values in step {row['step']} that are not finite; end "
            f"before it with --steps :{row['step'] - 1}"
        )


@contextmanager
def being_written(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, of this process alone, that takes its place at the end; after an
    exception it is removed. What an older program left there is removed, too.

    Raises:
        AttributionError: there is something else than values, or another process writes them.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        read_manifest(folder)
    folder = folder.resolve()
    unfinished, older = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "older"))
    unfinished.mkdir(parents=True, exist_ok=True)
    with locked(unfinished):
        for entry in unfinished.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise AttributionError(f"{folder}: another process writes values there; wait for it") from error
    finally:
        os.close(descriptor)
