"""Reading the Pile's format: lines of JSON `{"text": ..., "meta": {"pile_set_name": ...}}`.

Two halves. `find_inputs` and `line_batches` walk over files in bounded memory and look at nothing but line
ends; `parse_record` looks into one line, and can do so in another process. Lines of white space alone are no
records.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_processing.shards import ShardError, domain_file_name
from foundation.errors import UserError

COMPRESSION = {".jsonl": None, ".jsonl.zst": "zstd", ".jsonl.gz": "gzip"}
BATCH_BYTES = 1 << 20  # of text lines: large against the cost of a message, small against memory
MAX_LINE_BYTES = 256 << 20  # a longer line is a bad record, of which no more than this is ever held


class PileError(UserError):
    """Input that is missing or damaged, or a record that is not a Pile record."""


class BadRecord(ValueError):
    """Why one line is not a record; whoever knows file and line adds them."""


@dataclass(frozen=True)
class InputFile:
    """One input file, and what tells whether it is the same as at another time."""

    path: Path  # absolute
    size: int  # bytes on disk
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> "InputFile":
        status = path.stat()
        return cls(path.resolve(), status.st_size, status.st_mtime_ns)

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "size": self.size, "mtime_ns": self.mtime_ns}


@dataclass(frozen=True)
class LineBatch:
    """Whole lines of one file. The last batch of each file is marked, and may be empty."""

    source: InputFile
    first_line: int  # counted from 1
    data: bytes
    bytes_read: int  # of the file on disk, so far
    is_last: bool


def find_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """The input files in the order given; a folder stands for all files of a known suffix below it, sorted.

    Raises PileError for a path that is missing, of another suffix or given twice, and an empty folder.
    """
    found: dict[Path, InputFile] = {}
    for path in paths:
        files = _files_below(path) if path.is_dir() else [path]
        for file in files:
            if _suffix(file) is None:
                raise PileError(f"--input {file}: the name must end in one of {', '.join(COMPRESSION)}")
            if not file.is_file():
                raise PileError(f"--input {file}: no such file or folder")
            source = InputFile.at(file)
            if source.path in found:
                raise PileError(f"--input {file}: is given twice")
            found[source.path] = source
    return list(found.values())


def _files_below(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path) is not None)
    if not files:
        raise PileError(f"--input {folder}: holds no file that ends in one of {', '.join(COMPRESSION)}")
    return files


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in COMPRESSION if path.name.endswith(suffix)), None)


def line_batches(source: InputFile) -> Iterator[LineBatch]:
    """Reads a file in batches of whole lines, of about BATCH_BYTES or one longer line.

    Raises PileError if the file cannot be read, is truncated, or changed since `source` was taken.
    """
    first_line = 1
    pending: list[bytes] = []  # the beginning of a line whose end was not read yet
    try:
        with source.path.open("rb") as raw:
            stream = _decompressed(raw, source.path)
            while chunk := stream.read(BATCH_BYTES):
                line_end, last_end = chunk.find(b"\n"), chunk.rfind(b"\n")
                if last_end < 0:
                    _add(pending, chunk)
                    continue
                _add(pending, chunk[: line_end + 1])
                data = b"".join([*pending, chunk[line_end + 1 : last_end + 1]])
                yield LineBatch(source, first_line, data, raw.tell(), is_last=False)
                first_line += data.count(b"\n")
                pending = [chunk[last_end + 1 :]]
    except OSError as error:
        raise PileError(f"{source.path}: cannot be read ({error}); is the file whole?") from error
    if InputFile.at(source.path) != source:
        raise PileError(f"{source.path}: changed while it was read; start again when it is complete")
    yield LineBatch(source, first_line, b"".join(pending), source.size, is_last=True)


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    suffix = _suffix(path)
    assert suffix is not None, path
    compression = COMPRESSION[suffix]
    if compression is None:
        return raw
    # pyarrow reads streams of several frames too, in bounded memory, and a truncated one is an error. It is
    # imported here, because each worker process would import it for nothing: a third of its start.
    from pyarrow import CompressedInputStream

    stream: BinaryIO = CompressedInputStream(raw, compression)
    return stream


def _add(pending: list[bytes], data: bytes) -> None:
    """Appends to an unfinished line; once that is too long only its end, so that it stays too long."""
    if sum(map(len, pending)) <= MAX_LINE_BYTES:
        pending.append(data)
    elif data.endswith(b"\n"):
        pending.append(b"\n")


def numbered_lines(batch: LineBatch) -> Iterator[tuple[int, bytes]]:
    """The lines of a batch with their numbers, without those of white space alone."""
    for offset, line in enumerate(batch.data.split(b"\n")):
        if line and not line.isspace():
            yield batch.first_line + offset, line


def parse_record(line: bytes) -> tuple[str, str]:
    """One line -> (text, domain). Raises BadRecord, which says what is wrong."""
    if len(line) > MAX_LINE_BYTES:
        raise BadRecord(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
        ) from error
    except json.JSONDecodeError as error:
        raise BadRecord(f"malformed JSON: {error.msg} at character {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise BadRecord(f"malformed JSON: {error}") from error
    text = _string(record, "text")
    domain = _string(_member(record, "meta"), "pile_set_name", of="'meta'")
    try:
        domain_file_name(domain)
    except ShardError as error:
        raise BadRecord(str(error)) from error
    return text, domain


def _member(holder: object, name: str, *, of: str = "the record") -> object:
    if not isinstance(holder, dict):
        raise BadRecord(f"{of} is a JSON {_kind(holder)}, not an object with {name!r}")
    if name not in holder:
        raise BadRecord(f"{of} has no {name!r}")
    return holder[name]


def _string(holder: object, name: str, *, of: str = "the record") -> str:
    value = _member(holder, name, of=of)
    if not isinstance(value, str):
        raise BadRecord(f"{name!r} of {of} is a JSON {_kind(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(value[error.start]):04x}"
        raise BadRecord(
            f"{name!r} of {of} holds {escape}, half of a character: it is not Unicode text"
        ) from error
    return value


def _kind(value: object) -> str:
    """JSON's name for the type of a parsed value."""
    if value is None:
        return "null"
    return {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}[
        type(value)
    ]
