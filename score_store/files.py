"""The files of a folder of scores: their columns, their names, and how they survive a crash.

A file holds a range of steps of one process and is named so that names sort by step:
`step-{first}-{last}.rank-{rank}.parquet`. What holds at every moment, after kill -9 or power failure too:

- A file in the folder is whole: it is written under a hidden name beside the folder, synced, moved in.
- No row is lost, and none is silently read twice. A merge puts one file in the place of many, which no file
  system does in one operation: for a moment (milliseconds) both are there. For that moment the folder also
  holds a marker, `merging.rank-{rank}.parquet`, which is no Parquet file, so that whatever opens the folder
  just then stops with an error. The marker stays only if the process is killed right there, until the next
  writer of that rank, or recover(), puts the folder in order.
- Of two files of one rank, the one whose steps contain the other's counts. So it is certain at any moment
  what the rows are, and open_scores() reads them even while the marker is there.

What is left: who listed the files just before a merge finds them gone (FileNotFoundError) and lists again.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from foundation.errors import file_errors
from foundation.files import sync
from score_store.schema import DICTIONARY_COLUMNS, ScoreError

FILE_NAME = re.compile(r"step-(\d{12})-(\d{12})\.rank-(\d{5})\.parquet")
MARKER_NAME = re.compile(r"merging\.rank-(\d{5})\.parquet")
MARKER_TEXT = """Scores are being merged in this folder, and some rows are in two files.
If this file does not go away, the program was killed while merging; this puts the folder in order:
from score_store.files import recover; recover({!r})
"""


class ScoreFile(NamedTuple):
    path: Path
    first: int  # steps, both included
    last: int
    rank: int

    @property
    def hidden(self) -> Path:
        """Where it is written until it is whole. Not in the folder: Polars and DuckDB see hidden files."""
        folder = self.path.parent
        return folder.with_name(f".{folder.name}.{self.path.name}.tmp")

    @property
    def num_rows(self) -> int:
        return int(pq.read_metadata(self.path).num_rows)

    def read(self) -> pa.Table:
        try:
            with file_errors(self.path, ScoreError), pq.ParquetFile(self.path) as file:
                return file.read(use_threads=False)  # threads would each keep memory of their own
        except pa.ArrowInvalid as error:
            raise ScoreError(f"{self.path} is damaged ({error}): copy it again") from error


def score_file(folder: Path, first: int, last: int, rank: int) -> ScoreFile:
    return ScoreFile(folder / f"step-{first:012d}-{last:012d}.rank-{rank:05d}.parquet", first, last, rank)


def list_files(folder: Path) -> list[ScoreFile]:
    """Return every score file, sorted by step, then rank.

    Raises ScoreError for anything else that a reader would open.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")) or MARKER_NAME.fullmatch(path.name):
            continue
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            raise ScoreError(
                f"{path} is not a file of scores; the folder must hold nothing else: move it away"
            )
        files.append(ScoreFile(path, *map(int, match.groups())))
    return files


def superseded(files: Iterable[ScoreFile]) -> set[ScoreFile]:
    """Return the files whose rows another file of their rank has, too: left by an interrupted replacement.

    The file with the wider range of steps counts. A merged file contains those it was made of. A file that is being
    shortened contains its shortened copy, and counts until it is removed: the shortening has not happened yet.
    """
    found = set()
    covers: dict[int, ScoreFile] = {}  # rank -> the file that reaches furthest so far
    for file in sorted(files, key=lambda file: (file.first, -file.last)):
        cover = covers.get(file.rank)
        if cover is None or file.first > cover.last:
            covers[file.rank] = file
        elif file.last <= cover.last:
            found.add(file)
        else:
            raise ScoreError(
                f"{cover.path} and {file.path.name} both have step {file.first}: two programs wrote here at "
                "once, and no one can tell which rows are right; repeat the run"
            )
    return found


def read_origin(path: Path) -> dict[str, str]:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ScoreError(f"{path} is not a Parquet file ({error}); move it out of the folder") from error
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def check_origin(path: Path, want: Mapping[str, str]) -> None:
    """Raise ScoreError unless the file's metadata is exactly `want`."""
    got = read_origin(path)
    for key in sorted(got.keys() | want.keys()):
        if got.get(key) != want.get(key):
            raise ScoreError(
                f"{path} has {key} {got.get(key)!r:.200}, expected {want.get(key)!r:.200}: it is of another "
                "run, or of another version of this program; a folder holds the scores of one run"
            )


def put_in_order(folder: Path, rank: int) -> list[ScoreFile]:
    """Remove what an interrupted writer of `rank` left behind. Returns the rank's files, sorted by step."""
    for path in folder.parent.glob(f".{escape(folder.name)}.step-*.rank-{rank:05d}.parquet.tmp"):
        remove(path)
    files = [file for file in list_files(folder) if file.rank == rank]
    doubled = superseded(files)
    for file in doubled:
        remove(file.path)
    sync(folder)
    with file_errors(folder, ScoreError):
        _marker(folder, rank).unlink(missing_ok=True)
    return [file for file in files if file not in doubled]


def recover(folder: str | os.PathLike[str]) -> None:
    """Put a folder in order whose writers were killed. Not to be called while one is at work."""
    folder = Path(folder).resolve()
    for rank in {file.rank for file in list_files(folder)}:
        put_in_order(folder, rank)


def put_in_place(file: ScoreFile, table: pa.Table, replaces: Sequence[ScoreFile] = ()) -> None:
    """Make `file` visible with the rows of `table`, in the place of the files in `replaces`."""
    folder = file.path.parent
    with file_errors(file.path, ScoreError):
        _write_whole(file.hidden, table)
        if not replaces:
            os.replace(file.hidden, file.path)
            sync(folder)
            return
        with _marked(folder, file.rank):
            os.replace(file.hidden, file.path)
            sync(folder)  # the new file is there to stay before the first old one goes
            for old in replaces:
                os.unlink(old.path)
            sync(folder)


def remove(path: Path) -> None:
    """Remove a file. ScoreError if that cannot be done."""
    with file_errors(path, ScoreError):
        path.unlink()


def _marker(folder: Path, rank: int) -> Path:
    return folder / f"merging.rank-{rank:05d}.parquet"


@contextmanager
def _marked(folder: Path, rank: int) -> Iterator[None]:
    """Keep other programs from reading the folder. After an exception inside, the marker stays."""
    marker = _marker(folder, rank)
    _write_whole(marker, MARKER_TEXT.format(str(folder)).encode())
    sync(folder)
    yield
    os.unlink(marker)


def _write_whole(path: Path, content: pa.Table | bytes) -> None:
    """Write a file and sync it; one that cannot be written whole (disk full, ...) is removed and raises."""
    try:
        whole = f"{path} (the files that were there before are whole)"
        with file_errors(whole, ScoreError), path.open("wb") as sink:
            if isinstance(content, bytes):
                sink.write(content)
            else:
                pq.write_table(content, sink, compression="zstd", use_dictionary=DICTIONARY_COLUMNS)
            sink.flush()
            os.fsync(sink.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
