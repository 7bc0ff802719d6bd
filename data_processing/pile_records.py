"""Reading the Pile's format: lines of JSON `{"text": ..., "meta": {"pile_set_name": ...}}`.

`line_batches` walks over a file in bounded memory and looks at nothing but line ends; `parse_record` looks
into one line, and can do so in another process. Lines of white space alone are no records.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_processing.decompression import decompressed
from data_processing.deep_json import outer_values
from data_processing.input_files import InputFile, PileError
from data_processing.shards import ShardError, domain_file_name
from foundation.errors import file_errors

BATCH_BYTES = 1 << 20  # of text lines: large against the cost of a message, small against memory
MAX_LINE_BYTES = 256 << 20  # a longer line is a bad record, of which no more than this is ever held


class BadRecord(ValueError):
    """Why one line is not a record; whoever knows file and line adds them."""


@dataclass(frozen=True)
class LineBatch:
    """Whole lines of one file. The last batch of each file is marked, and may be empty."""

    source: InputFile
    first_line: int  # counted from 1
    data: bytes
    bytes_read: int  # of the file on disk, so far
    is_last: bool


def line_batches(source: InputFile) -> Iterator[LineBatch]:
    """Read a file in batches of whole lines, of about BATCH_BYTES or one longer line.

    A UTF-8 byte-order mark at its start is skipped.

    Raises:
        PileError: the file cannot be read, is not what its name says, is damaged, truncated or not UTF-8, or
            changed since `source` was taken.
    """
    first_line = 1
    pending: list[bytes] = []  # the beginning of a line whose end was not read yet
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


def _chunks(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the bytes of a stream without a byte-order mark. PileError if they are UTF-16 or UTF-32."""
    start = stream.read(4)
    encoding = json.detect_encoding(start)
    # Zeros alone are no text at all, and one before UTF-8 makes no UTF-16: JSON begins with ASCII.
    if not encoding.startswith("utf-8") and any(start) and start.decode(encoding, "replace").isascii():
        raise PileError(
            f"{path}: is {encoding.upper()} text, and has to be UTF-8; write it anew, as with "
            f"iconv --from-code {encoding.upper()} --to-code UTF-8"
        )
    chunk = start.removeprefix(codecs.BOM_UTF8) + stream.read(BATCH_BYTES)
    while chunk:
        yield chunk
        chunk = stream.read(BATCH_BYTES)


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
    """Return the value of one line of JSON; JSONDecodeError if it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except (
        ValueError,
        RecursionError,
    ):  # limits of the parser: digits of a number, depth of arrays and objects
        return outer_values(line, depth=2)  # of the record, and of its "meta"


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
