"""Compute the seeded order of blocks at any position, without a list of all blocks.

A keyed permutation (a Feistel network, Luby and Rackoff 1988) orders an epoch's blocks; a keyed hash draws
domains by weight. Both use integer arithmetic, so they are the same on every machine.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

COUNT_CHUNK = 1 << 20  # positions drawn at a time when the draws are recounted

Positions = npt.NDArray[np.int64]


def _keys(*what: object) -> npt.NDArray[np.uint64]:
    """Return (8,) keys for one purpose, the same on every machine."""
    return np.frombuffer(hashlib.blake2b(repr(what).encode()).digest(), "<u8").astype(np.uint64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit integers with SplitMix64's finalizer (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: Positions, size: int, keys: npt.NDArray[np.uint64]) -> Positions:
    """Return the images of the indices under the permutation of range(size) that the keys choose.

    A Feistel network permutes all integers of an even number of bits, fewer than 4 * size. Results outside of
    the range are permuted again until they are inside ("cycle walking", Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    permuted = indices.astype(np.uint64)
    outside = np.ones(len(permuted), bool)
    while outside.any():
        left, right = permuted[outside] >> half, permuted[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        permuted[outside] = left << half | right
        outside = permuted >= size
    return permuted.astype(np.int64)


def locate_blocks(flat: Positions, blocks_per_domain: dict[str, int]) -> list[tuple[str, int]]:
    """Return (domain, block) of numbers that count all blocks, domain after domain."""
    domains, blocks = tuple(blocks_per_domain), np.array(list(blocks_per_domain.values()))
    ends = np.cumsum(blocks)
    numbers = np.searchsorted(ends, flat, side="right")
    starts = (ends - blocks)[numbers]
    return [(domains[number], int(block)) for number, block in zip(numbers, flat - starts, strict=True)]


def seeded_choice(count: int, blocks_per_domain: dict[str, int], seed: int) -> list[tuple[str, int]]:
    """Return `count` distinct (domain, block), drawn by the seed. All blocks are equally likely."""
    size = sum(blocks_per_domain.values())
    assert count <= size, (count, size)
    return locate_blocks(permute(np.arange(count), size, _keys(seed, "choice")), blocks_per_domain)


def _epochs_in_order(ordinals: Positions, size: int, *purpose: object) -> Positions:
    """Return the elements at these places of a sequence of seeded orders of range(size), one per epoch."""
    epochs = ordinals // size
    elements = np.empty_like(ordinals)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        elements[now] = permute(ordinals[now] % size, size, _keys(*purpose, int(epoch)))
    return elements


class BatchOrder:
    """The seeded order of a split's blocks.

    Without weights each epoch visits every block once. With weights (domain -> weight) the domain of each
    position is drawn by weight, and the k-th draw of a domain takes the k-th block of the domain's own
    order, epoch after epoch.
    """

    def __init__(
        self, blocks_per_domain: dict[str, int], seed: int, weights: dict[str, float] | None = None
    ) -> None:
        assert min(blocks_per_domain.values()) > 0, blocks_per_domain
        if weights is not None and set(weights) != set(blocks_per_domain):
            raise ValueError(
                f"weights for {sorted(weights)}, but the domains are {sorted(blocks_per_domain)}"
            )
        self._blocks_per_domain = blocks_per_domain
        self._seed = seed
        self._draws = None
        if weights is not None:
            self._draws = WeightedDraws([weights[domain] for domain in blocks_per_domain], seed)

    def places(self, start: int, count: int) -> list[tuple[str, int]]:
        """Return (domain, block) at each of `count` positions from `start` on."""
        if self._draws is not None:
            return self._drawn(self._draws, start, count)
        size = sum(self._blocks_per_domain.values())
        flat = _epochs_in_order(np.arange(start, start + count), size, self._seed, "blocks")
        return locate_blocks(flat, self._blocks_per_domain)

    def _drawn(self, draws: "WeightedDraws", start: int, count: int) -> list[tuple[str, int]]:
        counts = draws.counts_before(start)
        numbers = draws.domains(start, count)
        blocks = np.empty(count, np.int64)
        for number, (domain, size) in enumerate(self._blocks_per_domain.items()):
            here = numbers == number
            ordinals = counts[number] + np.arange(np.count_nonzero(here))
            blocks[here] = _epochs_in_order(ordinals, size, self._seed, "blocks of", domain)
        domains = tuple(self._blocks_per_domain)
        return [(domains[number], int(block)) for number, block in zip(numbers, blocks, strict=True)]


class WeightedDraws:
    """Draw a domain by weight at each position, and count the draws before it."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._key = _keys(seed, "domains")[0]
        self._bounds = np.cumsum(weights)[:-1] / np.sum(weights)  # (domains - 1,) inner bounds in [0, 1)
        self._counts = np.zeros(len(weights), np.int64)
        self._counted = 0  # number of positions included in _counts

    def domains(self, start: int, count: int) -> Positions:
        """Return (count,) the number of the domain at each position from `start` on."""
        positions = np.arange(start, start + count).astype(np.uint64)
        hashed = _mix(self._key + positions * np.uint64(0x9E3779B97F4A7C15))  # SplitMix64 with random access
        uniform = (hashed >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        return np.searchsorted(self._bounds, uniform, side="right")

    def counts_before(self, position: int) -> Positions:
        """Return (domains,) how often each domain was drawn at lower positions.

        This is cheap from step to step. After a jump it counts the draws in between, about 0.1 s per million
        positions; after a jump backwards it recounts all of them.
        """
        if position < self._counted:
            self._counts[:] = 0
            self._counted = 0
        while self._counted < position:
            chunk = min(COUNT_CHUNK, position - self._counted)
            self._counts += np.bincount(self.domains(self._counted, chunk), minlength=len(self._counts))
            self._counted += chunk
        return self._counts
