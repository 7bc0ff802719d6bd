"""Open an input file as a stream of its text, in bounded memory."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from typing import Any

from data_processing.input_files import Compression, InputFile, PileError
from foundation.optional import optional

# First bytes of a file, by compression. A zstd file may begin with a skippable frame, of 16 kinds.
SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + kind]) + b"\x2a\x4d\x18" for kind in range(16))),
    "bzip2": (b"BZh",),
    "xz": (b"\xfd7zXZ\0",),
    "zip": (b"PK\x03\x04",),
}
NAME_FOR = {"gzip": ".gz", "zstd": ".zst"}
# The log of the longest window, 2 GiB, as of zstd --long=31. Memory use is that of the file's own window.
LONGEST_WINDOW = 31
# Words in the decompressor's error -> remedy; the first match counts.
REMEDIES = {
    "not enough memory": "it was packed with a long window, up to 2 GiB; use a machine with more memory",
    "Dictionary": "it needs the dictionary it was packed with; decompress it: zstd -d -D DICTIONARY",
    "": "it is damaged or followed by something else; copy or download it again, or save what `gzip -dc` or "
    "`zstd -dc` can read of it",
}


@contextmanager
def decompressed(raw: BufferedReader, source: InputFile) -> Iterator[BufferedIOBase]:
    """Yield the text of a file as a stream, over all its zstd frames or gzip members.

    Zeros after a gzip member are skipped, as gzip does. Any other bytes there are an error, because they may
    be a damaged member.

    Raises:
        PileError: the file is not what its name says. Also while the stream is read in the block: the file is
            damaged or truncated.
    """
    kind = source.compression
    _check_beginning(raw.peek(32)[:32], source)
    damage = (zlib.error, gzip.BadGzipFile, *([_zstd().ZstdError] if kind == "zstd" else []))
    try:
        yield raw if kind is None else _stream(raw, kind)
    except EOFError as error:
        raise PileError(
            f"{source.path}: ends in the middle of its {kind} data; copy or download it again"
        ) from error
    except damage as error:
        remedy = next(remedy for words, remedy in REMEDIES.items() if words in str(error))
        raise PileError(f"{source.path}: {error}: {remedy}") from error


def _stream(raw: BufferedReader, kind: Compression) -> BufferedIOBase:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    zstd = _zstd()
    stream: BufferedIOBase = zstd.ZstdFile(
        raw, options={zstd.DecompressionParameter.window_log_max: LONGEST_WINDOW}
    )
    return stream


def _zstd() -> Any:
    """Return the module, which is in the standard library from Python 3.14 on."""
    if sys.version_info >= (3, 14):
        return optional("compression.zstd", "train")
    return optional("backports.zstd", "train")


def _check_beginning(start: bytes, source: InputFile) -> None:
    """Raise PileError if a file's first bytes do not match its name. The message says what they are."""
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
