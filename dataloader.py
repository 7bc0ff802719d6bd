"""Memory-mapped shards -> training batches (x, y, sample ids), in a seeded order that nothing else decides.

Block b of a domain is tokens[b*T : b*T + T + 1]: neighbours share one token, so that each token after the
first is a target exactly once; what is left at a domain's end is not used. Row r of global step s is position
s*B + r of the order, with B the rows of all processes together: how many processes share them does not
matter, and a step is found without walking through those before it. Nothing here is as large as the data.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from batch_order import BatchOrder, seeded_choice
from command_line import ConfigError
from data_processing.shards import VOCAB, Shard, ShardError, list_shards
from domain_lists import Selection, listed, shown

BLOCK_BITS = 40  # a sample id is the number of the domain, then so many bits of the block's number


@dataclass(frozen=True)
class Batch:
    """b samples of T positions."""

    x: torch.Tensor  # (b, T) int64
    y: torch.Tensor  # (b, T) int64, the targets: y[:, t] is the token after x[:, t]; shifted once, here
    sample_ids: npt.NDArray[np.int64]  # (b,)
    domains: tuple[str, ...]  # length b
    blocks: npt.NDArray[np.int64]  # (b,) within the domain


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y (n, T), copied without waiting where they are in pinned memory."""
    return batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)


class BlockDataset:
    """The blocks of one split. Opening it reads no tokens: that happens as batches need them.

    domains: those in use, sorted; blocks_per_domain and checksums: of each of them, in that order;
    num_blocks and max_token_id: over all of them; tokenizer: the one that made them; short: tokens of each
    domain that is not used because it has no whole block.
    """

    def __init__(self, shards: Sequence[Shard], block_size: int, selection: Selection) -> None:
        """shards: all of the split, sorted. Raises as `open` does."""
        if block_size < 1:
            raise ConfigError(f"--block_size {block_size}: at least 1")
        self._numbers = {shard.domain: number for number, shard in enumerate(shards)}
        self.all_domains = list(self._numbers)
        self.block_size = block_size
        self.tokenizer = shards[0].tokenizer
        wanted = self._wanted(shards, selection)
        short = [shard for shard in wanted if self._blocks_of(shard) == 0]
        if short and (selection.domains is not None or len(short) == len(wanted)):
            raise ConfigError(self._too_short(short, wanted, selection))
        self.short = {shard.domain: shard.num_tokens for shard in short}
        self._shards = {shard.domain: shard for shard in wanted if shard not in short}
        self.domains = tuple(self._shards)
        self.checksums = {domain: shard.checksum for domain, shard in self._shards.items()}
        self.max_token_id = max(shard.max_token_id for shard in self._shards.values())
        self.blocks_per_domain = {domain: self._blocks_of(shard) for domain, shard in self._shards.items()}
        self.num_blocks = sum(self.blocks_per_domain.values())

    @classmethod
    def open(cls, data_dir: Path, block_size: int, selection: Selection) -> Self:
        """Opens a split, or some domains of it. Without names, domains without a whole block are left out.

        Raises ShardError if a shard is missing or damaged, ConfigError if a domain that was named is not
        there or has no whole block, or if none has one.
        """
        return cls(list_shards(data_dir, selection.split), block_size, selection)

    def _blocks_of(self, shard: Shard) -> int:
        return (shard.num_tokens - 1) // self.block_size

    def _wanted(self, shards: Sequence[Shard], selection: Selection) -> list[Shard]:
        names = self.all_domains if selection.domains is None else selection.domains
        missing = [name for name in names if name not in self._numbers]
        if missing:
            raise ConfigError(
                f"{selection.given}: no {listed(missing)} in {shards[0].path.parent}; choose from "
                f"{listed(self.all_domains)}"
            )
        return [shard for shard in shards if shard.domain in names]

    def _too_short(self, short: Sequence[Shard], wanted: Sequence[Shard], selection: Selection) -> str:
        folder, block = short[0].path.parent, f"a block is {self.block_size + 1} tokens"
        longest = max(wanted, key=lambda shard: shard.num_tokens)
        if longest in short:
            return (
                f"{selection.given}: {block}, and the longest of these domains in {folder} is "
                f"{_length(longest)}; choose --block_size {longest.num_tokens - 1} or smaller"
            )
        rest = selection.only(shard.domain for shard in wanted if shard not in short)
        enough = min(shard.num_tokens for shard in short) - 1
        return (
            f"{selection.given}: {block}, and in {folder} there are fewer in "
            f"{', '.join(map(_length, short))}; choose {rest}, or --block_size {enough} or smaller"
        )

    def tokens(self, domain: str, block: int) -> npt.NDArray[np.uint16]:
        """(T+1,) uint16: a view of the memory map, not to be kept. Raises IndexError if there is no such
        block, ShardError if the shard cannot be read any more."""
        if not 0 <= block < self.blocks_per_domain[domain]:
            raise IndexError(f"block {block} of {domain!r}, which has {self.blocks_per_domain[domain]}")
        start = block * self.block_size
        return self._shards[domain].tokens[start : start + self.block_size + 1]

    def sample_id(self, domain: str, block: int) -> int:
        """A block's id, the same for every choice of domains. Its high bits are the domain's place among all
        domains of the split, `all_domains`: another folder may have other domains, and then other ids."""
        return self._numbers[domain] << BLOCK_BITS | block

    def batch(self, places: Sequence[tuple[str, int]]) -> Batch:
        """The batch of these (domain, block). Raises ShardError if a token is beyond the vocabulary."""
        rows = np.empty((len(places), self.block_size + 1), np.uint16)  # (b, T+1)
        for row, (domain, block) in zip(rows, places, strict=True):
            row[:] = self.tokens(domain, block)  # one view at a time: each keeps a file open
        if rows.max() >= VOCAB:
            self._report_foreign_token(places, rows)
        tokens = torch.from_numpy(rows.astype(np.int64))
        return Batch(
            x=tokens[:, :-1].contiguous(),
            y=tokens[:, 1:].contiguous(),
            sample_ids=np.array([self.sample_id(domain, block) for domain, block in places], np.int64),
            domains=tuple(domain for domain, _ in places),
            blocks=np.array([block for _, block in places], np.int64),
        )

    def _report_foreign_token(self, places: Sequence[tuple[str, int]], rows: npt.NDArray[np.uint16]) -> None:
        """An embedding would fail on such a token too, but on a GPU without saying where it came from."""
        domain, block = places[int(rows.max(axis=1).argmax())]
        path = self._shards[domain].path.with_suffix(".bin")
        raise ShardError(
            f"{path}: token id {rows.max()} in block {block} is beyond the vocabulary of {VOCAB} ids: the "
            "file is damaged; tokenize again"
        )


def _length(shard: Shard) -> str:
    return f"{shown(shard.domain)} ({shard.num_tokens} tokens)"


class BatchLoader:
    """This process's rows of each global step, steps in any order: to resume, the step's number is enough.

    batch_size: rows of one micro-batch of one process; micro_batches: of each process in each step. weights:
    None, or of every domain of the dataset.
    """

    def __init__(
        self,
        dataset: BlockDataset,
        *,
        batch_size: int,
        seed: int,
        weights: dict[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"--batch_size {batch_size}: at least 1")
        assert 0 <= rank < world_size, (rank, world_size)
        self._dataset = dataset
        self._order = BatchOrder(dataset.blocks_per_domain, seed, weights)
        self._batch_size = batch_size
        self._rank, self._world_size, self.micro_batches = rank, world_size, micro_batches

    def batch(self, step: int, micro_batch: int = 0) -> Batch:
        """The b rows from (rank*G + micro_batch) * b on of global step `step`, with G micro-batches; all
        counted from 0."""
        assert 0 <= micro_batch < self.micro_batches, micro_batch
        process = step * self._world_size + self._rank
        start = (process * self.micro_batches + micro_batch) * self._batch_size
        return self._dataset.batch(self._order.places(start, self._batch_size))


class Prefetch:
    """A loader's batches, of which the next one is read while the present one is at work.

    pin: in memory from which a GPU copies while the program goes on. An error in reading a batch is raised
    when that batch is asked for.
    """

    def __init__(self, loader: BatchLoader, *, pin: bool) -> None:
        self._loader, self._pin = loader, pin
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._coming: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, step: int, micro_batch: int = 0) -> Batch:
        """As of `BatchLoader`: in any order, but only the one after the last is there already."""
        place = step, micro_batch
        if self._coming is None or self._coming[0] != place:
            self._coming = place, self._reader.submit(self._read, *place)
        batch = self._coming[1].result()
        last = micro_batch + 1 == self._loader.micro_batches
        place = (step + 1, 0) if last else (step, micro_batch + 1)
        self._coming = place, self._reader.submit(self._read, *place)
        return batch

    def _read(self, step: int, micro_batch: int) -> Batch:
        batch = self._loader.batch(step, micro_batch)
        return replace(batch, x=batch.x.pin_memory(), y=batch.y.pin_memory()) if self._pin else batch

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(cancel_futures=True)


def validation_batch(dataset: BlockDataset, m: int, seed: int) -> Batch:
    """m distinct blocks, all equally likely, chosen by the seed alone. ConfigError if there are fewer."""
    if not 1 <= m <= dataset.num_blocks:
        raise ConfigError(
            f"--val_batch_size {m}: there are {dataset.num_blocks} validation blocks of {dataset.block_size} "
            f"positions; choose 1 to {dataset.num_blocks}, or a smaller --block_size"
        )
    return dataset.batch(seeded_choice(m, dataset.blocks_per_domain, seed))
