"""A data folder made of another: of one split the shards cut, or left out; the other splits as they are."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from attribution.curate.cut_shards import Ranges, cut
from attribution.curate.drop_rule import Choice, dropped_numbers
from attribution.documents import bounds
from attribution.scored_run import AttributionError
from attribution.units import Unit
from attribution.values_folder import being_written
from data_processing.shards import TOKEN_TYPE, Shard, ShardWriter, list_shards, visible
from foundation.files import sync
from foundation.progress import progress_bar

COPY_BYTES = 1 << 24
# What os.link says where there are no links: to another file system, on one without, too many of one file.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class CutShard:
    """What becomes of a shard of the source. unit: what it is cut by; with_value: how many units have one;
    dropped, dropped_tokens: of those that were chosen."""

    shard: Shard
    unit: Unit
    block_size: int
    with_value: int
    dropped: int
    dropped_tokens: int

    @property
    def units(self) -> int:
        documents = self.unit == "documents"
        return self.shard.num_documents if documents else (self.shard.num_tokens - 1) // self.block_size

    @property
    def state(self) -> str:
        """unchanged, cut, or left out, if no block stays."""
        if self.dropped == 0:
            return "unchanged"
        return "cut" if self.shard.num_tokens - self.dropped_tokens > self.block_size else "left out"

    def ranges(self, dropped: Path) -> Iterator[Ranges]:
        """The tokens that go: of a block its first T, as the last is the next one's. dropped: as `choose`
        wrote it."""
        for numbers in dropped_numbers(dropped, self.unit, self.shard.domain):
            if self.unit == "documents":
                yield np.stack(bounds(self.shard, numbers), axis=1)
            else:
                yield np.stack([numbers * self.block_size, (numbers + 1) * self.block_size], axis=1)

    def describe(self, tokens_after: int) -> dict[str, Any]:
        return {
            "state": self.state,
            "units": self.units,
            "with_value": self.with_value,
            "dropped": self.dropped,
            "tokens_before": self.shard.num_tokens,
            "tokens_after": tokens_after,
            "source_sha256": self.shard.checksum,
        }


def plan(shards: Sequence[Shard], choice: Choice, unit: Unit, block_size: int) -> list[CutShard]:
    """AttributionError if it leaves nothing of any shard."""
    cuts = [
        CutShard(
            shard,
            unit,
            block_size,
            with_value=choice.with_value.get(shard.domain, 0),
            dropped=choice.dropped.get(shard.domain, 0),
            dropped_tokens=choice.dropped_tokens.get(shard.domain, 0),
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
    """AttributionError if it is there, or if the source folder would take it for a split."""
    if os.path.lexists(output):
        raise AttributionError(f"--output {output}: is there already; remove it, or name another folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise AttributionError(f"--output {output}: lies in the shards' own folder; name one beside {source}")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` at the end, safe from a power failure; after an exception it is
    removed. AttributionError if it cannot be written."""
    with being_written(output) as unfinished:
        yield unfinished
        for path in [unfinished, *unfinished.rglob("*")]:
            sync(path)


def other_splits(source: Path, split: str) -> list[Path]:
    """The folders of the splits but this one. ShardError if a shard of them is damaged."""
    folders = [path for path in sorted(source.iterdir()) if visible(path.glob("*.bin"))]
    others = [path for path in visible(folders) if path.name != split]
    for path in others:
        list_shards(source, path.name)
    return others


def write_splits(target: Path, others: Sequence[Path], cuts: Sequence[CutShard], dropped: Path) -> None:
    """Writes the splits of these folders, and the one that is cut, with a bar in bytes. dropped: as `choose`
    wrote it."""
    of_state = {state: [each for each in cuts if each.state == state] for state in ("unchanged", "cut")}
    copies = [path for folder in others for path in sorted(visible(folder.iterdir())) if path.is_file()]
    copies += [each.shard.path.with_suffix(end) for each in of_state["unchanged"] for end in SUFFIXES]
    total = sum(path.stat().st_size for path in copies)
    total += sum(each.shard.num_tokens * TOKEN_TYPE.itemsize for each in of_state["cut"])
    with progress_bar("writing shards", total, "B") as bar:
        for path in copies:
            (target / path.parent.name).mkdir(exist_ok=True)
            copy_file(path, target / path.parent.name / path.name, bar)
        for each in of_state["cut"]:
            shard, folder = each.shard, target / each.shard.split
            folder.mkdir(exist_ok=True)
            with ShardWriter(folder, shard.domain, split=shard.split, tokenizer=shard.tokenizer) as writer:
                cut(shard, each.ranges(dropped), writer, bar)


def copy_file(source: Path, target: Path, bar: tqdm) -> None:
    """A hard link where the file system has them: shards are never changed in place. Else a copy."""
    try:
        os.link(source.resolve(), target)  # the file, should the source be a symbolic link
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        with source.open("rb") as original, target.open("wb") as copy:
            while data := original.read(COPY_BYTES):
                copy.write(data)
                bar.update(len(data))
    else:
        bar.update(source.stat().st_size)
