"""Read the Pile's format: lines of JSON `{"text": ..., "meta": {"pile_set_name": ...}}`.

`read_line_batches` splits a file at line ends, in bounded memory. `parse_record` parses one line, possibly in
another process. Lines of white space are no records.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from data_processing.decompression import decompressed
from data_processing.deep_json import read_outer_values
from data_processing.input_files import InputFile, PileError
from data_processing.shard_files import ShardError
from data_processing.shards import domain_file_name
from foundation.errors import file_errors

BATCH_BYTES = 1 << 20  # of lines: enough to outweigh the cost of a message to a worker, and little memory
MAX_LINE_BYTES = 256 << 20  # a longer line is a bad record; no more of it than this is held in memory


class BadRecord(ValueError):
    """A line is not a record, with the reason. The caller adds file and line number."""


@dataclass(frozen=True)
class LineBatch:
    """Whole lines of one file."""

    source: InputFile
    first_line: int  # counted from 1
    data: bytes
    bytes_read: int  # of the file on disk, so far
    is_last: bool  # of its file; this batch may be empty


def read_line_batches(source: InputFile) -> Iterator[LineBatch]:
    """Yield a file in batches of whole lines, of about BATCH_BYTES or one longer line.

    A UTF-8 byte-order mark at the start is skipped.

    Raises:
        PileError: the file cannot be read, is not what its name says, is damaged, truncated or not UTF-8, or
            changed since `source` was made.
    """
    first_line = 1
    pending: list[bytes] = []  # the beginning of a line whose end is not read yet
    with file_errors(source.path, PileError), source.path.open("rb") as raw:
        with decompressed(raw, source) as stream:
            for chunk in _chunks(stream, source.path):
                line_end, last_end = chunk.find(b"\n"), chunk.rfind(b"\n")
                if last_end < 0:
                    _add(pending, chunk)
                    continue
                _add(pending, chunk[: line_end + 1])
                data = b"".join([*pending, chunk[line_end + 1 : last_end + 1]])
                yield LineBatch(source, first_line, data, raw.tell(), is_last=False)
                first_line += data.count(b"\n")
                pending = [chunk[last_end + 1 :]]
        if InputFile.at(source.path) != source:
            raise PileError(f"{source.path}: changed while it was read; start again when it is complete")
    yield LineBatch(source, first_line, b"".join(pending), source.size, is_last=True)


def _chunks(stream: BufferedIOBase, path: Path) -> Iterator[bytes]:
    """Yield a stream's bytes without a byte-order mark. Raises PileError if they are UTF-16 or UTF-32."""
    start = stream.read(4)
    encoding = json.detect_encoding(start)
    # detect_encoding only looks at zero bytes. It is right about UTF-16 and UTF-32 only if the decoded start
    # is ASCII, as of JSON, and not all zeros.
    if not encoding.startswith("utf-8") and any(start) and start.decode(encoding, "replace").isascii():
        raise PileError(
            f"{path}: is {encoding.upper()} text, and has to be UTF-8; convert it, as with "
            f"iconv --from-code {encoding.upper()} --to-code UTF-8"
        )
    chunk = start.removeprefix(codecs.BOM_UTF8) + stream.read(BATCH_BYTES)
    while chunk:
        yield chunk
        chunk = stream.read(BATCH_BYTES)


def _add(pending: list[bytes], data: bytes) -> None:
    """Append to an unfinished line. Once it is too long, only a line end is appended: it stays too long."""
    if sum(map(len, pending)) <= MAX_LINE_BYTES:
        pending.append(data)
    elif data.endswith(b"\n"):
        pending.append(b"\n")


def number_lines(batch: LineBatch) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a batch with their numbers, without lines of white space."""
    for offset, line in enumerate(batch.data.split(b"\n")):
        if line and not line.isspace():
            yield batch.first_line + offset, line


def parse_record(line: bytes) -> tuple[str, str]:
    """Return (text, domain) of one line. Raises BadRecord if it is not a record."""
    if len(line) > MAX_LINE_BYTES:
        raise BadRecord(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = _parsed(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
        ) from error
    except json.JSONDecodeError as error:
        raise BadRecord(f"malformed JSON: {error.msg} at character {error.colno}") from error
    text = _string(record, "text")
    domain = _string(_member(record, "meta"), "pile_set_name", of="'meta'")
    try:
        domain_file_name(domain)
    except ShardError as error:
        raise BadRecord(str(error)) from error
    return text, domain


def _parsed(line: str) -> object:
    """Return the value of one line of JSON. Raises JSONDecodeError if it is not JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):  # limits of the parser: a number's digits, the depth of nesting
        return read_outer_values(line, depth=2)  # the members of the record and of its "meta"


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
    """Return JSON's name for the type of a parsed value."""
    if value is None:
        return "null"
    return {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}[
        type(value)
    ]
