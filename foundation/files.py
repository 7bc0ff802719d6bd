"""Files and folders that appear whole or not at all, and locks."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sync(path: Path) -> None:
    """Make a file's content, or the renames and removals in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path, hidden: Path | None = None, *, durable: bool = True) -> Iterator[Path]:
    """Yield a hidden path for a file or folder, and rename it to `path` when the block ends without an exception.

    After an exception the hidden one is removed, and what stood at `path` is unchanged.

    Args:
        path: a file, which is replaced if it exists, or a folder that does not exist.
        hidden: on the same file system; None: `.{name}.tmp` beside `path`.
        durable: sync it and the folder around it, so that the result survives a power failure.
    """
    hidden = hidden or path.with_name(f".{path.name}.tmp")
    try:
        yield hidden
        if durable:
            for each in sorted(hidden.iterdir()) if hidden.is_dir() else []:
                sync(each)
            sync(hidden)
        os.replace(hidden, path)
    except BaseException:
        remove(hidden)
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, hidden: Path | None = None, *, durable: bool = True) -> None:
    """Write a text file in UTF-8 that is whole or not there: see `written_whole`."""
    with written_whole(path, hidden, durable=durable) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # a full disk must not hide the error that led here
    else:
        path.unlink(missing_ok=True)


def lock(file: IO[str] | int) -> None:
    """Take the exclusive lock of an open file or folder, which ends when it is closed.

    Raises BlockingIOError if another process has it, OSError if the file system has no locks."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
