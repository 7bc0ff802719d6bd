"""Make a data folder from another one: cut or leave out shards of one split, and link the other splits."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from attribution.curate.cut_shards import Ranges, cut_shard
from attribution.curate.drop_rule import Choice, read_dropped_numbers
from attribution.documents import locate_documents
from attribution.errors import AttributionError
from attribution.units import Unit
from attribution.values_folder import being_written
from data_processing.shards import Shard, ShardWriter, list_shards, visible
from foundation.files import sync
from foundation.progress import progress_bar

COPY_BYTES = 1 << 24
# Errors of os.link where a copy is needed: another file system, one without links, too many links to a file.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class CutShard:
    """A shard of the source, and how much of it is dropped."""

    shard: Shard
    unit: Unit  # what it is cut by
    block_size: int
    with_value: int  # number of units that have a value
    dropped: int  # number of units
    dropped_tokens: int

    @property
    def units(self) -> int:
        """Number of units in the source shard."""
        documents = self.unit == "documents"
        return self.shard.num_documents if documents else (self.shard.num_tokens - 1) // self.block_size

    @property
    def state(self) -> str:
        """What becomes of the shard: "unchanged", "cut", or "left out" if no whole block stays."""
        if self.dropped == 0:
            return "unchanged"
        return "cut" if self.shard.num_tokens - self.dropped_tokens > self.block_size else "left out"

    def ranges(self, dropped: Path) -> Iterator[Ranges]:
        """Yield the token ranges to drop. A block's are its first T tokens: the last is the next block's.

        Args:
            dropped: the file that `choose` wrote.
        """
        for numbers in read_dropped_numbers(dropped, self.unit, self.shard.domain):
            if self.unit == "documents":
                yield np.stack(locate_documents(self.shard, numbers), axis=1)
            else:
                yield np.stack([numbers * self.block_size, (numbers + 1) * self.block_size], axis=1)

    def describe(self, tokens_after: int) -> dict[str, Any]:
        """Return the shard's entry in the manifest."""
        return {
            "state": self.state,
            "units": self.units,
            "with_value": self.with_value,
            "dropped": self.dropped,
            "tokens_before": self.shard.num_tokens,
            "tokens_after": tokens_after,
            "source_sha256": self.shard.checksum,
        }


def plan_cuts(shards: Sequence[Shard], choice: Choice, unit: Unit, block_size: int) -> list[CutShard]:
    """Return what is cut from each shard. Raises AttributionError if nothing is left of any."""
    cuts = [
        CutShard(
            shard,
            unit,
            block_size,
            with_value=choice.with_value.get(shard.domain, 0),
            dropped=choice.dropped.get(shard.domain, 0),
            dropped_tokens=choice.dropped_tokens.get(shard.domain, 0)
            if unit == "documents"
            else choice.dropped.get(shard.domain, 0) * block_size,
        )
        for shard in shards
    ]
    if all(each.state == "left out" for each in cuts):
        raise AttributionError(
            f"--drop: no block would be left of any domain ({choice.reason}, {sum(choice.dropped.values())} "
            f"{unit}); choose fewer"
        )
    return cuts


def check_output(output: Path, source: Path) -> None:
    """Check where the curated folder goes.

    Raises:
        AttributionError: it exists, or is within the source folder, which would take it for a split.
    """
    if os.path.lexists(output):
        raise AttributionError(f"--output {output}: is there already; remove it, or name another folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise AttributionError(
            f"--output {output}: lies in the folder of its own source; name one beside {source}"
        )


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `output` when the block ends, synced to the disk.

    After an exception it is removed. Raises AttributionError if it cannot be written.
    """
    with being_written(output) as unfinished:
        yield unfinished
        for path in [unfinished, *unfinished.rglob("*")]:
            sync(path)


def find_other_splits(source: Path, split: str) -> list[Path]:
    """Return the folders of all splits but this one. Raises ShardError if one of their shards is damaged."""
    folders = [path for path in sorted(source.iterdir()) if visible(path.glob("*.bin"))]
    others = [path for path in visible(folders) if path.name != split]
    for path in others:
        list_shards(source, path.name)
    return others


def write_splits(target: Path, others: Sequence[Path], cuts: Sequence[CutShard], dropped: Path) -> None:
    """Write the other splits and the split that is cut, with a progress bar in bytes.

    Args:
        others: folders of splits to link or copy.
        dropped: the file that `choose` wrote.
    """
    of_state = {state: [each for each in cuts if each.state == state] for state in ("unchanged", "cut")}
    copies = [path for folder in others for path in sorted(visible(folder.iterdir())) if path.is_file()]
    copies += [each.shard.path.with_suffix(end) for each in of_state["unchanged"] for end in SUFFIXES]
    total = sum(path.stat().st_size for path in copies)
    total += sum(each.shard.num_tokens * each.shard.ids.token_type.itemsize for each in of_state["cut"])
    with progress_bar("writing shards", total, "B") as bar:
        for each in cuts[:1]:  # all are of one folder, whose tokenizer goes with its shards
            for path in each.shard.data_dir.glob("tokenizer-*.json"):
                copy_file(path, target / path.name, bar)
        for path in copies:
            (target / path.parent.name).mkdir(exist_ok=True)
            copy_file(path, target / path.parent.name / path.name, bar)
        for each in of_state["cut"]:
            shard, folder = each.shard, target / each.shard.split
            folder.mkdir(exist_ok=True)
            with ShardWriter(folder, shard.domain, split=shard.split, ids=shard.ids) as writer:
                cut_shard(shard, each.ranges(dropped), writer, bar)


def copy_file(source: Path, target: Path, bar: tqdm) -> None:
    """Make a hard link, or a copy where links are impossible.

    Links are safe: shards never change in place.
    """
    try:
        os.link(source.resolve(), target)  # resolved: the source may be a symbolic link
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        with source.open("rb") as original, target.open("wb") as copy:
            while data := original.read(COPY_BYTES):
                copy.write(data)
                bar.update(len(data))
    else:
        bar.update(source.stat().st_size)
