"""Find the files that `--input` names, and detect whether a file has changed."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from foundation.errors import UserError, file_errors

Compression = Literal["zstd", "gzip"]
LINE_ENDINGS = (".jsonl", ".ndjson")
COMPRESSED_ENDINGS: dict[str, Compression] = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip"}
ENDINGS = ".jsonl or .ndjson, or one of these and .zst, .zstd or .gz"
SHOWN_NAMES = 3  # of the files left out for one reason
SHOWN_REASONS = 6  # for leaving files out
log = logging.getLogger(__name__)


class PileError(UserError):
    """Input that is missing or damaged, or a record that is not a Pile record."""


@dataclass(frozen=True)
class InputFile:
    """One input file. Equal objects stand for the same, unchanged file."""

    path: Path  # absolute, links followed
    size: int  # bytes on disk
    mtime_ns: int
    compression: Compression | None = field(compare=False)  # by the given name, which may be a link's

    @classmethod
    def at(cls, path: Path) -> "InputFile":
        status = path.stat()
        return cls(path.resolve(), status.st_size, status.st_mtime_ns, COMPRESSED_ENDINGS.get(path.suffix))

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "size": self.size, "mtime_ns": self.mtime_ns}


def find_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """Return the input files in the order given. A folder stands for all files below it with a known ending.

    The files of a folder are sorted. Names that begin with a dot are left out, links are followed, and a file
    with several names is read once. One log line says how many were left out, and why.

    Raises:
        PileError: a path is missing, unreadable, has another ending or is given twice; a folder has no such
            file.
    """
    found: dict[Path, InputFile] = {}
    left_out = _LeftOut()
    for path in paths:
        with file_errors(f"--input {path}", PileError):
            for file in _files_below(path, left_out) if path.is_dir() else [path]:
                source = _checked(file)
                if source.path in found:
                    raise PileError(f"--input {file}: is given twice")
                found[source.path] = source
    if left_out.names:
        log.info("left out of --input: %s", left_out)
    return list(found.values())


def _checked(file: Path) -> InputFile:
    if not _has_known_ending(file):
        raise PileError(f"--input {file}: the name must end in {ENDINGS}")
    if not file.exists():
        aim = f", but a link to {os.readlink(file)}, which is not there" if file.is_symlink() else ""
        raise PileError(f"--input {file}: no such file or folder{aim}")
    if not file.is_file():
        raise PileError(f"--input {file}: is neither a file nor a folder")
    return InputFile.at(file)


def _has_known_ending(path: Path) -> bool:
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED_ENDINGS else path.name
    return name.endswith(LINE_ENDINGS)


class _LeftOut:
    """Files and folders that were left out, by reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[Path]] = {}

    def add(self, reason: str, path: Path) -> None:
        self.names.setdefault(reason, []).append(path)

    def __str__(self) -> str:
        """Return one line: for each reason the count and the first names."""
        reasons = sorted(self.names, key=lambda reason: (-len(self.names[reason]), reason))
        rest = sum(len(self.names[reason]) for reason in reasons[SHOWN_REASONS:])
        return ", ".join(map(self._count, reasons[:SHOWN_REASONS])) + f", and {rest} others" * (rest > 0)

    def _count(self, reason: str) -> str:
        paths = self.names[reason]
        first = ", ".join(_printable(path) for path in paths[:SHOWN_NAMES])
        return f"{len(paths)} {_printable(reason)} ({first}{', ...' * (len(paths) > SHOWN_NAMES)})"


def _printable(text: object) -> str:
    """Return the text, or its repr if it has unprintable characters: file names may hold line ends."""
    return str(text) if str(text).isprintable() else repr(str(text))


def _files_below(folder: Path, left_out: _LeftOut) -> list[Path]:
    """Return the files to read below a folder, sorted, and add all others to `left_out`."""
    candidates: list[Path] = []
    visited: set[str] = set()  # also stops at a cycle of links
    skipped = _LeftOut()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real_parent = os.path.realpath(parent)
        if real_parent in visited:
            skipped.add("reached before by another name", Path(parent))
            folders.clear()
            continue
        visited.add(real_parent)
        for name in sorted(folders + files):
            if name.startswith("."):
                skipped.add("hidden", Path(parent, name))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        candidates += (Path(parent, name) for name in files if not name.startswith("."))
    chosen: dict[str, Path] = {}
    for file in sorted(candidates):
        if not _has_known_ending(file):
            skipped.add(_ending(file), file)
        elif chosen.setdefault(os.path.realpath(file), file) != file:
            skipped.add("reached before by another name", file)
    if not chosen:
        others = f"; left out: {skipped}" if skipped.names else ""
        raise PileError(f"--input {folder}: holds no file that ends in {ENDINGS}{others}")
    for reason, names in skipped.names.items():
        left_out.names.setdefault(reason, []).extend(names)
    return list(chosen.values())


def _ending(file: Path) -> str:
    """Return '*.json' of 'a.json', '*.json.gz' of 'a.json.gz'."""
    count = 2 if file.suffix in COMPRESSED_ENDINGS else 1
    return f"*{''.join(file.suffixes[-count:])}" if file.suffix else "without an ending"


def _raise(error: OSError) -> NoReturn:
    raise error
