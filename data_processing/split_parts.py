"""Write a split in parts, one per input file, in a hidden folder beside the split's own, and join them.

    {output_dir}/.{split}.work/{hash of the input's path}/   bad_records.txt; at the end part.manifest
    {output_dir}/.{split}.work/{hash of the input's path}/shards/
    {output_dir}/.{split}.work/joined/                       all parts joined; becomes {output_dir}/{split}

So a split is there as a whole or not at all, and after an interruption finished input files are not
tokenized again. While parts are joined, a split takes twice its space on the disk.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_processing.batch_encoder import Counts, EncodedBatch
from data_processing.input_files import InputFile, PileError
from data_processing.shards import (
    FORMAT_VERSION,
    Shard,
    ShardWriter,
    TokenIds,
    domain_file_name,
    open_shard,
    write_json_atomically,
)
from foundation.files import lock, sync

MAX_DOMAINS = 256  # of a part; each has a writer with two buffers
JOIN_TOKENS = 1 << 23  # read at a time when parts are joined
# Beside shards in the finished split: no file of a shard ends like these, whatever the domain.
BAD_RECORDS = "bad_records.txt"
MANIFEST = "inputs.manifest"
PART = "part.manifest"  # of a finished part


@contextmanager
def work_folder(output_dir: Path, split: str) -> Iterator[Path]:
    """Yield the split's hidden folder, locked by this process. Remove it at the end if no part is finished.

    Raises:
        PileError: another process has locked it, or it cannot be created.
    """
    folder = output_dir / f".{split}.work"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PileError(f"--output_dir {output_dir}: cannot be written ({error}); choose another") from error
    with (folder / "lock").open("w") as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise PileError(
                f"--output_dir {output_dir}: another process is writing split {split!r}; wait"
            ) from error
        try:
            yield folder
        finally:
            if folder.exists() and not any(folder.glob(f"*/{PART}")):
                shutil.rmtree(folder)


@dataclass(frozen=True)
class Part:
    """The shards of one finished input file."""

    folder: Path
    counts: Counts
    domains: list[str]

    def shard(self, domain: str) -> Shard:
        """Open the shard of one domain."""
        return open_shard(shards_folder(self.folder) / f"{domain_file_name(domain)}.json")


def shards_folder(part: Path) -> Path:
    """Return the folder of a part's shards, where domain names cannot clash with the part's own files."""
    return part / "shards"


@dataclass(frozen=True)
class PartKey:
    """The input and the settings that a part was made with. A part with another key is recomputed."""

    source: InputFile
    split: str
    ids: TokenIds

    def as_json(self) -> dict[str, Any]:
        names = {"format_version": FORMAT_VERSION, "split": self.split, **asdict(self.ids)}
        return names | self.source.as_json()

    def folder(self, work: Path) -> Path:
        return work / hashlib.sha256(str(self.source.path).encode()).hexdigest()[:24]


def find_finished_part(work: Path, key: PartKey) -> Part | None:
    """Return the finished part with this key, or None."""
    folder = key.folder(work)
    path = folder / PART
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    if content["key"] != key.as_json():
        return None
    return Part(folder, Counts(**content["counts"]), content["domains"])


class PartWriter:
    """Write one part, as a context manager. After an exception there is no finished part."""

    def __init__(self, work: Path, key: PartKey) -> None:
        self.key = key
        self._folder = key.folder(work)
        self._counts = Counts()
        self._shards: dict[str, ShardWriter] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._folder.exists():
            shutil.rmtree(self._folder)
        shards_folder(self._folder).mkdir(parents=True)
        self._bad_records = self._stack.enter_context(
            (self._folder / BAD_RECORDS).open("w", encoding="utf-8")
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            content = {
                "key": self.key.as_json(),
                "counts": asdict(self._counts),
                "domains": list(self._shards),
            }
            write_json_atomically(self._folder / PART, content)

    def add(self, batch: EncodedBatch) -> None:
        """Add a batch. Batches come in the order of the input file. Raises PileError on too many domains."""
        for domain, tokens in batch.tokens.items():
            if domain not in self._shards:
                self._shards[domain] = self._open(domain)
            self._shards[domain].extend(tokens)
        for line, reason in batch.bad_records:
            self._bad_records.write(f"{self.key.source.path}:{line}: {reason}\n")
        self._counts.add(batch.counts)

    def _open(self, domain: str) -> ShardWriter:
        if len(self._shards) == MAX_DOMAINS:
            raise PileError(
                f"{self.key.source.path}: has more than {MAX_DOMAINS} domains, the next is {domain!r}; "
                "meta.pile_set_name is the name of a set of many documents"
            )
        shard = ShardWriter(shards_folder(self._folder), domain, split=self.key.split, ids=self.key.ids)
        return self._stack.enter_context(shard)


def join_parts(work: Path, parts: Sequence[Part], *, split: str, ids: TokenIds) -> Path:
    """Join parts, in order, into one shard per domain. Return the folder.

    Raises:
        PileError: no part has a document.
    """
    folder = work / "joined"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    domains = sorted({domain for part in parts for domain in part.domains})
    if not domains:
        raise PileError(
            "the inputs hold no document: every line is blank, bad, or a record with an empty text"
        )
    for domain in domains:
        with ShardWriter(folder, domain, split=split, ids=ids) as joined:
            for part in parts:
                if domain in part.domains:
                    _append_shard(joined, part.shard(domain))
    if any(part.counts.bad_records for part in parts):
        with (folder / BAD_RECORDS).open("wb") as joined_list:
            for part in parts:
                with (part.folder / BAD_RECORDS).open("rb") as part_list:
                    shutil.copyfileobj(part_list, joined_list)
    return folder


def _append_shard(joined: ShardWriter, shard: Shard) -> None:
    """Append a shard's documents, in pieces of documents that start within JOIN_TOKENS."""
    starts = shard.document_starts
    first = 0
    # Read the file, not the memory map: its pages would stay in memory.
    with shard.path.with_suffix(".bin").open("rb") as file:
        while first < shard.num_documents:
            last = int(np.searchsorted(starts, starts[first] + JOIN_TOKENS))
            stop = starts[last] if last < shard.num_documents else shard.num_tokens
            joined.extend(np.fromfile(file, shard.ids.token_type, stop - starts[first]))
            first = last


def publish_split(joined: Path, work: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Rename the joined shards to the split's folder, and remove the work folder."""
    write_json_atomically(joined / MANIFEST, manifest)
    with ThreadPoolExecutor(8) as threads:  # file systems commit concurrent syncs together
        list(threads.map(sync, joined.iterdir()))
    joined.rename(target)
    shutil.rmtree(work)
