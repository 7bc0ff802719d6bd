"""What a run needs of the file system that its folder is on, tried out before anything is trained.

Without this check the first checkpoint would be the first to fail, after hours of training.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import ConfigError
from foundation.files import lock, sync

TRIAL = ".trial.tmp"  # the folder in which it is tried out
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
ELSEWHERE = "keep runs on another one, with --results_dir or RESULTS_DIR"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Space:
    """Bytes that a run will write. one: its next checkpoint, 0 if there will be none; total: all checkpoints
    that it will have at a time, and its scores."""

    one: int = 0
    total: int = 0


def check_file_system(folder: Path, space: Space, freed: int = 0, *, named: Path | None = None) -> None:
    """Try out in `folder`, which is there, what a run does with its files. Leave nothing behind.

    Args:
        freed: bytes that the run will remove before it writes.
        named: the folder that messages speak of; None: `folder`.

    Raises:
        ConfigError: the file system lacks something, or has no room for a single checkpoint.
    """
    trial, named = folder / TRIAL, named or folder
    try:
        if trial.exists():  # of a run that was killed in here
            shutil.rmtree(trial)
        trial.mkdir()
    except OSError as error:
        raise ConfigError(f"{named} cannot be written ({error.strerror}): {ELSEWHERE}") from error
    try:
        for what, attempt in ATTEMPTS.items():
            _try(trial, named, what, attempt)
    finally:
        shutil.rmtree(trial)
    _check_space(named if named.exists() else folder, space, freed)


def bytes_below(folder: Path) -> int:
    """Return the size of all files in a folder and its subfolders; a link counts as itself."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _try(trial: Path, folder: Path, what: str, attempt: Callable[[Path], None]) -> None:
    try:
        attempt(trial)
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): {ELSEWHERE}") from error
        raise ConfigError(
            f"{folder}: its file system has no {what} ({error.strerror}), which a run needs: {ELSEWHERE}"
        ) from error


def _lock(trial: Path) -> None:
    with (trial / "lock").open("a") as file, (trial / "lock").open("a") as other:
        lock(file)
        try:
            lock(other)
        except BlockingIOError:
            return
    raise OSError(errno.ENOLCK, "a second lock was granted beside the first")


def _append(trial: Path) -> None:
    for _ in range(2):
        with (trial / "lines").open("ab") as file:
            file.write(b"line\n")
    sync(trial / "lines")


def _replace_file(trial: Path) -> None:
    for name in ("old", "new"):
        (trial / name).write_bytes(name.encode())
    os.replace(trial / "new", trial / "old")
    if (trial / "old").read_bytes() != b"new":
        raise OSError(errno.EIO, "the old content is still there")


def _rename_folder(trial: Path) -> None:
    (trial / "hidden").mkdir()
    (trial / "hidden" / "file").write_bytes(b"content")
    (trial / "hidden").rename(trial / "final")
    sync(trial)


def _replace_link(trial: Path) -> None:
    (trial / "link").symlink_to("lines")
    (trial / "new link").symlink_to("final")
    os.replace(trial / "new link", trial / "link")
    if not (trial / "link").is_symlink() or os.readlink(trial / "link") != "final":
        raise OSError(errno.EIO, "a link does not lead where it was set")


ATTEMPTS: dict[str, Callable[[Path], None]] = {
    "locks": _lock,
    "writing at the end of a file": _append,
    "renaming of a file over another": _replace_file,
    "renaming of folders": _rename_folder,
    "symbolic links": _replace_link,
}


def _check_space(folder: Path, space: Space, freed: int) -> None:
    usage = shutil.disk_usage(folder)
    if usage.total == 0:
        return  # some network mounts do not say how large they are
    free = usage.free + freed
    if free < space.one:
        raise ConfigError(
            f"{folder}: {_gigabytes(free)} are free, and one checkpoint takes {_gigabytes(space.one)}: make "
            "room, or name another folder with --results_dir or RESULTS_DIR"
        )
    if free < space.total:
        logger.warning(
            "%s: %s are free, and this run will write about %s (%s a checkpoint): make room, or lower "
            "--keep_checkpoints",
            folder,
            _gigabytes(free),
            _gigabytes(space.total),
            _gigabytes(space.one),
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
