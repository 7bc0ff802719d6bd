"""Open an input file as a stream of its text, in bounded memory, or say why it is none."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import BinaryIO

from data_processing.input_files import Compression, InputFile, PileError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# What a file begins with. A zstd file may begin with a frame to be skipped, of 16 kinds.
SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + kind]) + b"\x2a\x4d\x18" for kind in range(16))),
    "bzip2": (b"BZh",),
    "xz": (b"\xfd7zXZ\0",),
    "zip": (b"PK\x03\x04",),
}
NAME_FOR = {"gzip": ".gz", "zstd": ".zst"}
# Files made with zstd --long=31 refer to 2 GiB back. The memory is that of the file's own window.
LONGEST_WINDOW = {zstd.DecompressionParameter.window_log_max: 31}
# What to do, by words in the decompressor's error.
REMEDIES = {
    "not enough memory": "it was packed with a long window, up to 2 GiB; use a machine with more memory",
    "Dictionary": "it needs the dictionary it was packed with; write it anew without: zstd -d -D DICTIONARY",
    "": "it is damaged or followed by something else; copy or download it again, or write anew what "
    "`gzip -dc` or `zstd -dc` can read of it",
}


@contextmanager
def decompressed(raw: BufferedReader, source: InputFile) -> Iterator[BinaryIO]:
    """Yield the text of a file as a stream: of all frames of zstd, of all members of gzip.

    Zeros after a member of gzip are skipped, as gzip does. Anything else that follows is an error: it may be
    a damaged member.

    Raises:
        PileError: the file is not what its name says; and, from reading the stream inside the block, it is
            damaged or truncated.
    """
    kind = source.compression
    _check_beginning(raw.peek(32)[:32], source)
    try:
        yield raw if kind is None else _stream(raw, kind)
    except EOFError as error:
        raise PileError(
            f"{source.path}: ends in the middle of its {kind} data; copy or download it again"
        ) from error
    except (zstd.ZstdError, zlib.error, gzip.BadGzipFile) as error:
        remedy = next(remedy for words, remedy in REMEDIES.items() if words in str(error))
        raise PileError(f"{source.path}: {error}: {remedy}") from error


def _stream(raw: BinaryIO, kind: Compression) -> BinaryIO:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    stream: BinaryIO = zstd.ZstdFile(raw, options=LONGEST_WINDOW)
    return stream


def _check_beginning(start: bytes, source: InputFile) -> None:
    """Raise PileError if a file does not begin as its name says, with what it is instead."""
    found = next((kind for kind, signatures in SIGNATURES.items() if start.startswith(signatures)), None)
    named = source.compression
    if found == named:
        return
    if found is None:
        assert named is not None
        if not start:
            raise PileError(f"{source.path}: is empty, which no {named} file is; copy or download it again")
        if not any(signature.startswith(start) for signature in SIGNATURES[named]):  # else it is truncated
            raise PileError(
                f"{source.path}: is not {named} data, as its name says, but begins with {start!r}; "
                "if that is the text itself, take the last ending off the name"
            )
        return
    remedy = f"let its name end in {NAME_FOR[found]}" if found in NAME_FOR else "decompress it first"
    raise PileError(f"{source.path}: holds {found} data, which its name does not say; {remedy}")
