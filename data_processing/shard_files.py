"""Read and write the files of hundreds of shards with few open files.

Many machines allow a process 256 or 1024 open files, and a memory map counts as one. So files are mapped on
demand, and beyond MAX_MAPPED maps the least recently used one is closed. Files that are written are open only
during a write.
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

MAX_MAPPED = 32  # more than the Pile has domains, far below 256
BUFFER_BYTES = 1 << 17  # per written file: 32 MiB for 256 domains


class ShardError(UserError):
    """A shard, or a folder of shards, is missing, damaged or not what it should be."""


class MappedFile:
    """A file of numbers of one type, mapped on demand. Any thread may read it."""

    def __init__(self, path: Path, item_type: np.dtype[Any], checksum: str) -> None:
        """Note the file's size and time of change; read nothing.

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
        """Size in bytes."""
        return self._seen[0]

    def array(self) -> npt.NDArray[Any]:
        """Return the whole file as a read-only array. Only the parts in use are read from the disk.

        The array and its slices keep the file open: hold them for a short time, and copy what you keep.

        Raises:
            ShardError: the file cannot be read, or its content has changed since this object was made.
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
        """Read the whole file. Raises ShardError if its checksum is not the expected one."""
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
        """Drop the map. It closes once no array refers to it."""
        self._array = None
        del _MAPPED[self]


# Mapped files, the least recently used first. The keys are weak: a shard's maps close with its last
# reference, so that its folder can be removed (NFS keeps open files).
_MAPPED: WeakKeyDictionary[MappedFile, None] = WeakKeyDictionary()
_LOCK = threading.RLock()


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class AppendedFile:
    """A new file that is appended to in pieces of at least BUFFER_BYTES, and closed in between."""

    def __init__(self, path: Path) -> None:
        """Create the file. Raises OSError; FileExistsError if it exists."""
        self._path = path
        self._buffer = bytearray()
        path.open("xb").close()

    def write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffer to the file."""
        with self._path.open("ab") as file:
            file.write(self._buffer)
        self._buffer.clear()
