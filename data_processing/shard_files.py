"""The files of hundreds of shards with few descriptors.

A file that is read is mapped when it is needed; of more than MAX_MAPPED maps the least recently used is
closed. A file that is written is open during a write only. A map keeps a descriptor for as long as it lives,
and many machines allow a process 256 or 1024 of them.
"""

import hashlib
import mmap
import os
import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from foundation.errors import UserError, file_errors

MAX_MAPPED = 32  # more than the Pile has domains, and few against the lowest limits in use
BUFFER_BYTES = 1 << 17  # of a file that is written: 32 MiB for 256 domains


class ShardError(UserError):
    """A shard, or a folder of shards, is missing, damaged or not what it should be."""


class MappedFile:
    """A file of numbers of one type, to be read from any thread."""

    def __init__(self, path: Path, item_type: np.dtype, checksum: str) -> None:
        """Take the file's size and time of change; read nothing.

        Args:
            checksum: the SHA-256 that the file should have, hexadecimal; see `verify`.

        Raises:
            ShardError: there is no such file.
        """
        self.path = path
        self._item_type, self._checksum = item_type, checksum
        self._array: npt.NDArray[Any] | None = None
        with file_errors(path, ShardError):
            self._seen = _size_and_time(path.stat())

    @property
    def size(self) -> int:
        """Bytes."""
        return self._seen[0]

    def array(self) -> npt.NDArray[Any]:
        """Return all of the file as a read-only array, of which only what is used is read.

        The array keeps a descriptor: hold it, or a slice of it, for a short time, and copy what stays.

        Raises:
            ShardError: the file is gone, cannot be read, or is another than when this object was made.
        """
        with _LOCK:
            _MAPPED.pop(self, None)
            _MAPPED[self] = None  # the most recently used is the last
            if self._array is None:
                while len(_MAPPED) > MAX_MAPPED:
                    next(iter(_MAPPED))._unmap()
                self._array = self._map()
            return self._array

    def verify(self) -> None:
        """Read the whole file. Raises ShardError if its checksum is not the one that it should have."""
        with file_errors(self.path, ShardError), self.path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != self._checksum:
            raise ShardError(
                f"{self.path}: sha256 is {actual}, its JSON says {self._checksum}; damaged: tokenize again"
            )

    def _map(self) -> npt.NDArray[Any]:
        with file_errors(self.path, ShardError), self.path.open("rb") as file:
            now = _size_and_time(os.fstat(file.fileno()))
            if now != self._seen:  # written to, replaced, or only touched
                self.verify()
                self._seen = now
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(data, self._item_type)

    def _unmap(self) -> None:
        """Close the map, as soon as nobody has a slice of it."""
        self._array = None
        del _MAPPED[self]


# In the order of use. Weak: the maps of a shard that nobody needs any more are closed at once, so that its
# folder can be removed (NFS keeps files that are open).
_MAPPED: WeakKeyDictionary[MappedFile, None] = WeakKeyDictionary()
_LOCK = threading.RLock()


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class AppendedFile:
    """A new file that is written at its end, in pieces of BUFFER_BYTES or more; closed in between."""

    def __init__(self, path: Path) -> None:
        """Make the file, empty. Raises OSError; FileExistsError if it is there."""
        self._path = path
        self._buffer = bytearray()
        path.open("xb").close()

    def write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is left in the buffer."""
        with self._path.open("ab") as file:
            file.write(self._buffer)
        self._buffer.clear()
