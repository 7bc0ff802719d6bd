"""What all contractions share: the division of a joint batch, products, tiles, and what train rows are
contracted with.

A matrix parameter has, for sample i, the gradient  G_i = left_iᵀ right_i  of shape (p, d). The step needs
Σ_i G_i over the train rows anyway; attribution wants <G_i, D> as well, where D is the direction, by default
the validation gradient. The ways to compute both stand in strategies/, one file each.

Index letters: n train rows, m validation rows, T positions, k directions (1, or m for pairwise scores), p and
d the two sides of the weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Scratch
from .preconditioner import Preconditioner

# `instantiate` walks the weight in tiles of about this many numbers, so that a tile of the gradient, of the
# direction and of the sum stay in a CPU's third-level cache together. Smaller ones would stay in a faster
# cache, but make the matrix products slower by more than that saves, as would a shorter side than SIDE
# (benchmarks/RESULTS.md).
TILE_NUMEL = 1 << 20
SIDE = 128


@dataclass(frozen=True)
class Split:
    """How a joint batch is divided, and what is asked of it.

    n: train rows, which come first. m: validation rows. pairwise: one score for each (train, validation)
    pair, not one for the mean validation gradient."""

    n: int
    m: int
    pairwise: bool = False

    @property
    def directions(self) -> int:
        """k: how many validation gradients are kept apart."""
        return self.m if self.pairwise else 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of dots and running sums: never below float32 (a bfloat16 sum over 50 layers is off by
    1 %)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Tile = tuple[slice, slice]


def tiles(p: int, d: int, numel: int) -> Iterator[Tile]:
    """Yield rows and columns of the tiles of a (p, d) weight, about `numel` numbers each: cut along its
    longer side, so that the matrix products have two long ones."""
    longer, shorter = max(p, d), min(p, d)
    count = -(-longer // max(SIDE, numel // shorter))
    side, everything = -(-longer // count), slice(None)
    for start in range(0, longer, side):
        part = slice(start, min(start + side, longer))
        yield (part, everything) if p >= d else (everything, part)


def products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Set out (b, r, c) to each left (b, T, r)ᵀ right (b, T, c), which is rounded to their dtype before it is
    widened."""
    if left.dtype == out.dtype:
        return torch.bmm(left.mT, right, out=out)
    return out.copy_(left.mT @ right)


def add_gradient(left: Tensor, right: Tensor, total: Tensor, fresh: bool) -> None:
    """Add Σ_i left_iᵀ right_i to total (p, d), or write it there if fresh: one product over all rows and
    positions."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right, beta=0 if fresh else 1)  # beta=0: whatever was in there is not read
    elif fresh:
        total.copy_(left.mT @ right)
    else:
        total += left.mT @ right


def direction_of(left: Tensor, right: Tensor, split: Split) -> Tensor:
    """Return the validation gradient(s) of one weight.

    left (m, T, p), right (m, T, d): the validation rows. Returns (k, p, d) in the accumulation dtype: Σ_j
    left_jᵀ right_j, never (Σ_j left_j)ᵀ(Σ_j right_j), or with pairwise each left_jᵀ right_j."""
    left, right = validation_factors(left, right, split)
    shape = (len(left), left.shape[2], right.shape[2])
    return products(left, right, left.new_empty(shape, dtype=accumulation_dtype(left.dtype)))


def validation_factors(left: Tensor, right: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """(m, T, ...) -> (k, ...), whose products left_kᵀ right_k are the directions."""
    if split.pairwise:
        return left, right
    return left.flatten(0, 1)[None], right.flatten(0, 1)[None]


def precondition_tiles(direction: Tensor, preconditioner: Preconditioner | None, scratch: Scratch) -> Tensor:
    """Multiply a whole weight's direction (k, p, d) by its preconditioner, if there is one, in place."""
    if preconditioner is not None:
        _, p, d = direction.shape
        for rows, columns in tiles(p, d, TILE_NUMEL):
            tile = direction[:, rows, columns]
            preconditioner.apply(tile, (rows, columns), scratch.take("preconditioner", tile[0].numel(), tile))
    return direction


class Whole:
    """A direction that is there: (k, p, d)."""

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    @property
    def k(self) -> int:
        return len(self.direction)

    def whole(self) -> Tensor:
        return self.direction

    def tile(self, tile: Tile) -> Tensor:
        """Return the directions' part in a tile, (k, r, c)."""
        return self.direction[:, tile[0], tile[1]]


class Validation:
    """The validation rows of one weight, from which the direction is made: as a whole, or tile by tile so
    that it is never there as a whole; left (m, T, p), right (m, T, d)."""

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        split: Split,
        preconditioner: Preconditioner | None,
        scratch: Scratch,
    ) -> None:
        self.left, self.right, self.split = left, right, split
        self.preconditioner, self.scratch = preconditioner, scratch

    @property
    def k(self) -> int:
        return self.split.directions

    def whole(self) -> Tensor:
        direction = direction_of(self.left, self.right, self.split)
        return precondition_tiles(direction, self.preconditioner, self.scratch)

    def tile(self, tile: Tile) -> Tensor:
        left, right = (
            t[..., part]
            for t, part in zip(validation_factors(self.left, self.right, self.split), tile, strict=True)
        )
        shape = (self.k, left.shape[2], right.shape[2])
        dtype = accumulation_dtype(left.dtype)
        like = left if left.dtype == dtype else left.new_empty(0, dtype=dtype)
        memory = self.scratch.take("direction", shape[0] * shape[1] * shape[2], like).view(shape)
        direction = products(left, right, memory)
        if self.preconditioner is not None:
            memory = self.scratch.take("preconditioner", shape[1] * shape[2], like)
            self.preconditioner.apply(direction, tile, memory)
        return direction

    def parts(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Return the rows in parts: which columns of the dots they are, left and right."""
        return [(slice(0, self.k), self.left, self.right)]


Against = Whole | Validation
"""What train rows are contracted with."""
