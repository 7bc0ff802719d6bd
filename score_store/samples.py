"""The samples of a run that are not blocks of shards, kept beside its scores: what the tools show of them.

    {result_dir}/samples/part-{rank}-{number}.parquet    sample_id, group, text, tokens, metadata, digest

Every process of the run writes parts of its own, each of which appears whole or not at all. A sample is named by
the id that its scores have. Two processes that meet the same sample at once may both write it: readers give it once,
and refuse another content under the same id. Because of this, small parts can be merged without a moment at which a
sample is missing: the merged part appears before the small ones go.

metadata is a JSON object; "image" in it is the path of the sample's image below the folder of images, "pieces" the
texts of its tokens, which joined are its text (pieces.py): then the report colours it by word.
"""

import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from foundation.errors import file_errors
from foundation.files import sync, written_whole
from score_store.schema import ScoreError

KEPT = "kept"  # in the metadata of the scores, under "samples": LLaVA records, whose ids have the domain's number
OWN = "own"  # the same of a run of any loop, whose ids are its own
IMAGES = "images"  # folder beside the records
ONE_GROUP = "all"  # the group of samples that are not divided into groups
ROWS = 4096  # in a row group, which is what a reader of one sample reads
PART_ROWS = 16 * ROWS  # parts with fewer rows are merged
SHOWN = 60  # letters of a text in a message
PART_NAME = re.compile(r"part-(\d{5})-(\d{6})\.parquet")
FORMAT = {"format": "ghostEngines samples", "format_version": "2"}
SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "group": pa.string(),
        "text": pa.string(),
        "tokens": pa.list_(pa.int32()),  # as the model gets them, without padding
        "metadata": pa.string(),
        "digest": pa.int64(),  # of the other columns
    },
    metadata=FORMAT,
)
# Version 1 was of one part, whose writer refused an id that came twice.
SCHEMA_1 = pa.schema(list(SCHEMA)[:-1], metadata={**FORMAT, "format_version": "1"})

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sample, as the tools show it."""

    sample_id: int  # the dataset's row index, or a column of integers that tells its rows apart
    text: str
    tokens: Sequence[int]  # as the model gets them, without padding
    group: str = ONE_GROUP
    metadata: dict[str, Any] = field(default_factory=dict)  # what else there is to know, as JSON

    def check(self) -> None:
        """Raise ScoreError for what cannot be written."""
        try:
            np.int64(operator.index(self.sample_id))
            tokens = np.asarray(self.tokens, np.int64)
            if tokens.ndim != 1 or (tokens < 0).any() or (tokens > np.iinfo(np.int32).max).any():
                raise ValueError("a token is no id")
            (self.text + self.group + self._metadata).encode()
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ScoreError(
                f"sample {self.sample_id!r} cannot be written ({error}): its id must be an integer of 64 bits, text "
                "and group texts, tokens ids without padding, and metadata what JSON has"
            ) from error

    @cached_property
    def digest(self) -> int:
        """Return a number of 64 bits that tells the sample's content from others."""
        found = blake2b(np.asarray(self.tokens, "<i4").tobytes(), digest_size=8)
        for part in (self.group, self.text, self._metadata):
            content = part.encode("utf-8", "surrogatepass")
            found.update(len(content).to_bytes(8))
            found.update(content)
        return int.from_bytes(found.digest(), signed=True)

    @property
    def _metadata(self) -> str:
        return json.dumps(self.metadata, sort_keys=True)

    @property
    def columns(self) -> dict[str, Any]:
        """Return the sample as a row of SCHEMA."""
        return {
            "sample_id": int(self.sample_id),
            "group": self.group,
            "text": self.text,
            "tokens": np.asarray(self.tokens, np.int32).tolist(),
            "metadata": self._metadata,
            "digest": self.digest,
        }


class SampleWriter:
    """Write the samples of one process of a run into `folder`, which all processes of the run share.

    Each is written once, also after a resume: opening the folder, and every flush, reads which ids are there, of all
    processes. That takes 16 bytes of memory for each id, and for moments three times that. As a context manager it
    closes itself.

    Raises:
        ScoreError: the folder holds something else than samples, or cannot be written.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        assert 0 <= rank < 100_000, rank
        self.folder, self.rank = folder, rank
        self._known = Digests()
        self._read: set[str] = set()  # names of the parts whose ids are known
        self._buffer: dict[int, Sample] = {}
        with file_errors(folder, ScoreError):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f".part-{rank:05d}-*"):  # left by a process that was killed
                path.unlink()
        self._learn()
        rows = {path: pq.read_metadata(path).num_rows for path in self._own_parts()}
        self._small = {
            path: count for path, count in rows.items() if count < PART_ROWS
        }  # the rows of small parts

    def append(self, samples: Iterable[Sample]) -> None:
        """Buffer the samples whose ids are new.

        Raises:
            ScoreError: an id is there with another content.
        """
        for sample in samples:
            sample.check()
            number = int(sample.sample_id)
            if number in self._buffer:
                known: int | None = self._buffer[number].digest
            else:
                known = self._known.get(number)
            if known is None:
                self._buffer[number] = sample
            elif known != sample.digest:
                other = self._buffer[number].columns if number in self._buffer else self._find(number)
                raise ScoreError(f"{self.folder}: {differ(other, sample.columns)}")
            if len(self._buffer) >= PART_ROWS:
                self.flush()

    def flush(self) -> None:
        """Write what is buffered as one more part, without what other processes wrote since; merge small parts."""
        self._learn()
        rows = []
        for number, sample in self._buffer.items():
            known = self._known.get(number)
            if known is None:
                rows.append(sample.columns)
            elif known != sample.digest:
                raise ScoreError(f"{self.folder}: {differ(self._find(number), sample.columns)}")
        if rows:
            self._write(iter([pa.Table.from_pylist(rows, schema=SCHEMA)]))
        self._buffer.clear()
        if sum(self._small.values()) >= PART_ROWS:
            self._merge()

    def close(self) -> None:
        """Write what is buffered, and merge the small parts."""
        self.flush()
        self._merge()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _own_parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"part-{self.rank:05d}-*.parquet"))

    def _merge(self) -> None:
        """Put one part in the place of the small ones. Its samples are there twice for a moment, never not at all."""
        parts = list(self._small)
        if len(parts) < 2:
            return
        self._write(read_part(path, SCHEMA.names) for path in parts)
        with file_errors(self.folder, ScoreError):
            for path in parts:
                path.unlink()
                del self._small[path]
            sync(self.folder)

    def _write(self, tables: Iterator[pa.Table]) -> None:
        own = self._own_parts()
        number = int(own[-1].stem.rpartition("-")[2]) + 1 if own else 0
        path, written = self.folder / f"part-{self.rank:05d}-{number:06d}.parquet", 0
        with (
            file_errors(path, ScoreError),
            written_whole(path) as hidden,
            pq.ParquetWriter(hidden, SCHEMA, compression="zstd") as writer,
        ):
            waiting = SCHEMA.empty_table()
            for table in tables:
                written += len(table)
                waiting = pa.concat_tables([waiting, table])
                if len(waiting) >= ROWS:
                    writer.write_table(waiting, row_group_size=ROWS)
                    waiting = SCHEMA.empty_table()
            if len(waiting):
                writer.write_table(waiting)
        if written < PART_ROWS:
            self._small[path] = written
        self._learn()

    def _learn(self) -> None:
        """Read the ids of the parts that are new."""
        for path in list_parts(self.folder):
            if path.name in self._read:
                continue
            try:
                table = read_part(path, ["sample_id", "digest"])
            except FileNotFoundError:  # another process merged it since the parts were listed
                assert not path.name.startswith(f"part-{self.rank:05d}-")
                continue
            self._known.add(table["sample_id"].to_numpy(), table["digest"].to_numpy())
            self._read.add(path.name)

    def _find(self, number: int) -> dict[str, Any]:
        return StoredRows([self.folder]).read(number)


class Digests:
    """The digest of each id: sorted arrays, each at least twice as long as the next, so that adding is cheap."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ids, Ids]] = []

    def add(self, ids: Ids, digests: Ids) -> None:
        """Add ids, in any order, and their digests (k,)."""
        while self._parts and len(self._parts[-1][0]) < 2 * len(ids):
            more = self._parts.pop()
            ids, digests = np.concatenate([more[0], ids]), np.concatenate([more[1], digests])
        unique, places = np.unique(ids, return_index=True)
        self._parts.append((unique, digests[places]))

    def get(self, number: int) -> int | None:
        """Return an id's digest; None if it is not there."""
        for ids, digests in self._parts:
            place = int(np.searchsorted(ids, number))
            if place < len(ids) and ids[place] == number:
                return int(digests[place])
        return None


class StoredRows:
    """The samples in one or several folders, each of which is there once. Reading one reads a part's row group.

    Opening reads all ids, which takes 65 bytes of memory for each; 16 of them stay.

    Args:
        folders: of runs of the same data.

    Raises:
        ScoreError: a folder is missing, damaged or of another version; an id has two contents.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self._groups: list[tuple[Path, int]] = []  # part and number of each row group
        ids, digests, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
        for path in (path for folder in folders for path in list_parts(folder)):
            with file_errors(path, ScoreError):
                for group, table in enumerate(tables_of(path, ["sample_id", "digest"])):
                    self._groups.append((path, group))
                    ids.append(table["sample_id"].to_numpy())
                    digests.append(table["digest"].to_numpy())
                    lengths.append(len(table))
        self._starts = np.append(0, np.cumsum(lengths, dtype=np.int64))  # first place of each row group
        every, contents = np.concatenate(ids), np.concatenate(digests)
        self._places = np.argsort(every, kind="stable")  # of equal ids the first place comes first
        ordered, contents = every[self._places], contents[self._places]
        again = ordered[1:] == ordered[:-1]
        for place in np.flatnonzero(again & (contents[1:] != contents[:-1]))[:1]:
            first, second = (self._at(int(self._places[each])) for each in (place, place + 1))
            raise ScoreError(f"{', '.join(map(str, folders))}: {differ(first, second)}")
        keep = np.append(True, ~again)[: len(ordered)]
        self.ids: Ids = ordered[keep]  # (k,) ascending
        self._places = self._places[keep]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, number: int) -> dict[str, Any]:
        """Return a sample's row. Raises LookupError if it is not there."""
        place = int(np.searchsorted(self.ids, number))
        if place == len(self.ids) or self.ids[place] != number:
            raise LookupError(f"there is no sample {number}")
        return self._at(int(self._places[place]))

    def tables(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """Yield columns of the samples, each once, in tables of at most some thousand rows, by the time of writing."""
        kept = np.sort(self._places)
        for number, (path, group) in enumerate(self._groups):
            first, last = np.searchsorted(kept, self._starts[number : number + 2])
            if first < last:
                yield read_part(path, columns, group).take(kept[first:last] - self._starts[number])

    def _at(self, place: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, place, "right")) - 1
        path, group = self._groups[number]
        row: dict[str, Any] = (
            read_part(path, SCHEMA.names, group).slice(place - int(self._starts[number]), 1).to_pylist()[0]
        )
        return row


def differ(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return, in words, that two rows with one id are of different content."""
    shown = []
    for row, other in ((first, second), (second, first)):
        names = [name for name in ("group", "tokens", "metadata") if row[name] != other[name]]
        others = "".join(f", {name} {row[name]!s:.{SHOWN}}" for name in names)
        shown.append(f"{row['text'][:SHOWN]!r}{others}")
    return (
        f"sample id {first['sample_id']} is there with two contents: {shown[0]}; and {shown[1]}; an id must name the "
        "same sample in every epoch and process, as the dataset's row index does"
    )


def list_parts(folder: Path) -> list[Path]:
    """Return the parts of a folder, sorted. Raises ScoreError if it is missing or holds other Parquet files."""
    with file_errors(folder, ScoreError):
        if not folder.is_dir():
            raise ScoreError(f"{folder} is missing: copy the run's folder again")
        found = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    for path in found:
        if not PART_NAME.fullmatch(path.name) and path.name != "part-000000.parquet":  # the part of version 1
            raise ScoreError(
                f"{path} is not a part of samples; the folder must hold nothing else: move it away"
            )
    return found


def read_part(path: Path, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Return columns of a part, or of one row group of it.

    Raises:
        ScoreError: it is damaged, or of another version.
        FileNotFoundError: it is gone.
    """
    return pa.concat_tables(tables_of(path, columns, None if group is None else [group]))


def tables_of(path: Path, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[pa.Table]:
    """Yield columns of each row group of a part, or of some of them. Raises as `read_part`."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            first = schema.metadata == SCHEMA_1.metadata and schema == SCHEMA_1
            if not first and (schema != SCHEMA or schema.metadata != SCHEMA.metadata):
                raise ScoreError(
                    f"{path} holds other columns than {SCHEMA.names}: another version of this program wrote it"
                )
            for group in range(file.num_row_groups) if groups is None else groups:
                names = [name for name in columns if name in schema.names]
                table = file.read_row_group(group, columns=names)
                if first and "digest" in columns:  # ids are unique there, so that no digests are compared
                    table = table.append_column("digest", pa.repeat(pa.scalar(0, pa.int64()), len(table)))
                yield table
    except pa.ArrowInvalid as error:
        raise ScoreError(f"{path} is damaged ({error}): copy the run's folder again") from error


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Write a folder of samples, whole or not at all. It must not be there. Raises as `SampleWriter`."""
    coming = iter(samples)
    with file_errors(folder), written_whole(folder) as hidden, SampleWriter(hidden) as writer:
        while rows := list(islice(coming, ROWS)):
            writer.append(rows)


def open_samples(*folders: Path) -> StoredRows:
    """Return the samples of one or several folders. Raises as `StoredRows`."""
    return StoredRows(folders)
