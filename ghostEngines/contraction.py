"""What all contraction strategies share: the division of a joint batch, products, tiles, and the direction.

The gradient of a matrix parameter for sample i is  G_i = left_iᵀ right_i  of shape (p, d). Training needs Σ_i
G_i over the train rows. Attribution also needs <G_i, D>, where D is the direction, by default the validation
gradient. The ways to compute both are in strategies/, one file each.

Index letters: n train rows, m validation rows, T positions, k directions (1, or m for pairwise scores), p and
d the two sides of the weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Scratch
from .preconditioner import Preconditioner

# `instantiate` processes the weight in tiles of about this many numbers, so that a tile of the gradient, of
# the direction and of the sum fit into a CPU's third-level cache together. Smaller tiles would fit into a
# faster cache, but slow down the matrix products by more than that saves. So would a side shorter than SIDE
# (benchmarks/RESULTS.md).
TILE_NUMEL = 1 << 21
SIDE = 128


@dataclass(frozen=True)
class Split:
    """How a joint batch is divided, and which scores are needed."""

    n: int  # train rows, which come first
    m: int  # validation rows
    pairwise: bool = False  # one score per (train, validation) pair, not one for the mean validation gradient
    given: int = 0  # directions that are given; 0: the validation rows make the direction
    positions: int = 0  # T: one score for each position of a row (k = 1); 0: for all of them together

    @property
    def directions(self) -> int:
        """Return k: how many directions are kept apart."""
        return self.given or (self.m if self.pairwise else 1)

    @property
    def scores(self) -> int:
        """Return how many scores a train row has: k, or T by position."""
        return self.positions or self.directions


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of dots and running sums: float32, or float64 for float64.

    A bfloat16 sum over 50 layers would be off by 1 %.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


Tile = tuple[slice, slice]


def tiles(p: int, d: int, numel: int) -> Iterator[Tile]:
    """Yield the rows and columns of the tiles of a (p, d) weight, of about `numel` numbers each.

    The weight is cut along its longer side, so that the matrix products have two long sides.
    """
    longer, shorter = max(p, d), min(p, d)
    count = -(-longer // max(SIDE, numel // shorter))
    side, everything = -(-longer // count), slice(None)
    for start in range(0, longer, side):
        part = slice(start, min(start + side, longer))
        yield (part, everything) if p >= d else (everything, part)


def products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Set out (b, r, c) to each left_iᵀ right_i, for left (b, T, r) and right (b, T, c), and return it.

    The product is rounded to the dtype of left and right before it is widened.
    """
    if left.dtype == out.dtype:
        return torch.bmm(left.mT, right, out=out)
    return out.copy_(left.mT @ right)


def add_gradient(left: Tensor, right: Tensor, total: Tensor, fresh: bool) -> None:
    """Add Σ_i left_iᵀ right_i to total (p, d), or write it there if fresh.

    It is one product over all rows and positions.
    """
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right, beta=0 if fresh else 1)  # beta=0: the old content is not read
    elif fresh:
        total.copy_(left.mT @ right)
    else:
        total += left.mT @ right


def direction_of(left: Tensor, right: Tensor, split: Split) -> Tensor:
    """Return the validation gradient of one weight, or with pairwise that of each validation row.

    Args:
        left, right: (m, T, p) and (m, T, d), of the validation rows.

    Returns:
        (k, p, d) in the accumulation dtype: Σ_j left_jᵀ right_j, never (Σ_j left_j)ᵀ(Σ_j right_j); with
        pairwise each left_jᵀ right_j.
    """
    left, right = validation_factors(left, right, split)
    shape = (len(left), left.shape[2], right.shape[2])
    return products(left, right, left.new_empty(shape, dtype=accumulation_dtype(left.dtype)))


def validation_factors(left: Tensor, right: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Reshape (m, T, ...) to (k, ...), so that the products left_kᵀ right_k are the directions."""
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
    """A direction (k, p, d) that is in memory."""

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    @property
    def k(self) -> int:
        return len(self.direction)

    def whole(self) -> Tensor:
        """Return the direction, (k, p, d)."""
        return self.direction

    def tile(self, tile: Tile) -> Tensor:
        """Return the direction's part in a tile, (k, r, c)."""
        return self.direction[:, tile[0], tile[1]]


class Validation:
    """A direction that is computed from the validation rows of one weight: as a whole, or tile by tile."""

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        split: Split,
        preconditioner: Preconditioner | None,
        scratch: Scratch,
    ) -> None:
        """Keep the validation rows: left (m, T, p), right (m, T, d)."""
        self.left, self.right, self.split = left, right, split
        self.preconditioner, self.scratch = preconditioner, scratch

    @property
    def k(self) -> int:
        return self.split.directions

    def whole(self) -> Tensor:
        """Return the direction, (k, p, d)."""
        direction = direction_of(self.left, self.right, self.split)
        return precondition_tiles(direction, self.preconditioner, self.scratch)

    def tile(self, tile: Tile) -> Tensor:
        """Return the direction's part in a tile, (k, r, c), in scratch memory."""
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
        """Return the validation rows in parts: their columns in the dots, left and right."""
        return [(slice(0, self.k), self.left, self.right)]
