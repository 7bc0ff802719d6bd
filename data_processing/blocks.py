"""Cut memory-mapped shards into blocks: the samples of a run, with permanent ids.

Block b of a domain is tokens[b*T : b*T + T + 1]. Neighbours share one token, so each token after the first is
a target exactly once. Tokens after a domain's last whole block are not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from data_processing.domain_lists import Selection, listed, shown
from data_processing.shard_files import ShardError
from data_processing.shards import Shard, TokenIds, Tokens, list_shards
from foundation.errors import ConfigError

BLOCK_BITS = 40  # a sample id is the domain's number << BLOCK_BITS | the block's number


@dataclass(frozen=True)
class Batch:
    """b samples of T positions."""

    x: torch.Tensor  # (b, T) int64
    y: torch.Tensor  # (b, T) int64, the targets: y[:, t] is the token after x[:, t]; not to be shifted again
    sample_ids: npt.NDArray[np.int64]  # (b,)
    domains: tuple[str, ...]  # length b
    blocks: npt.NDArray[np.int64]  # (b,) within the domain
    images: torch.Tensor | None = None  # (b, 3, height, width) one image a sample, where samples have one

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a model is called with: x, y, and the images if there are any."""
        return (self.x, self.y) if self.images is None else (self.x, self.y, self.images)

    def to(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return the inputs on a device, copied without waiting where they are in pinned memory."""
        return tuple(each.to(device, non_blocking=True) for each in self.inputs)

    def pinned(self) -> Self:
        """Return the batch in memory from which a GPU copies while the program runs."""
        x, y, *images = (each.pin_memory() for each in self.inputs)
        return replace(self, x=x, y=y, images=images[0] if images else None)


class BlockDataset:
    """The blocks of one split, or of some of its domains. Tokens are read when a batch needs them."""

    all_domains: list[str]  # of the split, sorted
    block_size: int  # T
    folder: Path  # of the splits
    ids: TokenIds
    tokenizer: str  # that made the tokens
    short: dict[str, int]  # domain -> tokens, of the domains left out because they have no whole block
    domains: tuple[str, ...]  # in use, sorted
    checksums: dict[str, str]  # domain -> sha256 of its tokens, of those in use
    max_token_id: int  # over the domains in use
    blocks_per_domain: dict[str, int]  # of those in use, sorted by domain
    num_blocks: int  # over the domains in use

    def __init__(self, shards: Sequence[Shard], block_size: int, selection: Selection) -> None:
        """Select domains of a split. shards: all of the split, sorted. Raises as `open`."""
        if block_size < 1:
            raise ConfigError(f"--block_size {block_size}: at least 1")
        self._numbers = {shard.domain: number for number, shard in enumerate(shards)}
        self.all_domains = list(self._numbers)
        self.block_size = block_size
        self.ids, self.folder = shards[0].ids, shards[0].path.parent.parent
        self.tokenizer = self.ids.tokenizer
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
        """Open a split, or some domains of it.

        If the selection names no domains, those without a whole block are left out.

        Raises:
            ShardError: a shard is missing or damaged.
            ConfigError: a named domain does not exist or has no whole block; no domain has one.
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

    def tokens(self, domain: str, block: int) -> Tokens:
        """Return a block's tokens (T+1,), a view of the memory map: do not keep it.

        Raises:
            IndexError: there is no such block.
            ShardError: the shard can no longer be read.
        """
        if not 0 <= block < self.blocks_per_domain[domain]:
            raise IndexError(f"block {block} of {domain!r}, which has {self.blocks_per_domain[domain]}")
        start = block * self.block_size
        return self._shards[domain].tokens[start : start + self.block_size + 1]

    def sample_id(self, domain: str, block: int) -> int:
        """Return a block's id, which does not depend on the selected domains.

        Its high bits are the domain's index in `all_domains`. A folder with other domains gives other ids.
        """
        return self._numbers[domain] << BLOCK_BITS | block

    def batch(self, places: Sequence[tuple[str, int]]) -> Batch:
        """Return the batch of these (domain, block). Raises ShardError for a token beyond the vocabulary."""
        rows = np.empty((len(places), self.block_size + 1), self.ids.token_type)  # (b, T+1)
        for row, (domain, block) in zip(rows, places, strict=True):
            row[:] = self.tokens(domain, block)  # one view at a time: each one keeps a file open
        if rows.max() >= self.ids.vocabulary:
            self._report_foreign_token(places, rows)
        tokens = torch.from_numpy(rows.astype(np.int64))
        return Batch(
            x=tokens[:, :-1].contiguous(),
            y=tokens[:, 1:].contiguous(),
            sample_ids=np.array([self.sample_id(domain, block) for domain, block in places], np.int64),
            domains=tuple(domain for domain, _ in places),
            blocks=np.array([block for _, block in places], np.int64),
        )

    def _report_foreign_token(self, places: Sequence[tuple[str, int]], rows: Tokens) -> None:
        """Raise ShardError for a token beyond the vocabulary. A GPU's error would not name the shard."""
        domain, block = places[int(rows.max(axis=1).argmax())]
        path = self._shards[domain].path.with_suffix(".bin")
        raise ShardError(
            f"{path}: token id {rows.max()} in block {block} is beyond the vocabulary of {self.ids.vocabulary} "
            "ids: the file is damaged; tokenize again"
        )


def _length(shard: Shard) -> str:
    return f"{shown(shard.domain)} ({shard.num_tokens} tokens)"
