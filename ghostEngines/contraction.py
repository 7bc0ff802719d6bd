"""One weight gradient, and its per-sample dot products on the way.

Every linear-like layer has, for sample i, the gradient  G_i = left_iᵀ right_i  of shape (p, d): for
`nn.Linear` left are the backprops and right the activations, for a transposed weight the other way round. The
step needs Σ_i G_i over the train rows anyway; attribution wants <G_i, D> as well, where D is the direction,
by default the validation gradient.

Index letters: n train rows, m validation rows, T positions, k directions (1, or m for pairwise scores), p and
d the two sides of the weight. All functions here are pure but for `total`, which they add to or, if it is
`fresh`, write over, and for the scratch memory.

    strategy     extra operations       extra memory      good when
    gram         2·n·m·T²·(d+p)         2·n·m·T²          T is small against d·p/(d+p)
    project      2·k·n·T·d·p            n·T·d             rarely; a simple cross-check
    instantiate  none                   1+k tiles (CPU)   T is large

`gram` works on the validation rows themselves, the others on the direction made from them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .memory import Keep, Scratch
from .preconditioner import Preconditioner

Strategy = Literal["gram", "project", "instantiate"]
STRATEGIES: tuple[Strategy, ...] = ("gram", "project", "instantiate")

# `instantiate` walks the weight in tiles of about this many numbers, so that a tile of the gradient, of the
# direction and of the sum stay in a CPU's third-level cache together. Smaller ones would stay in a faster
# cache, but make the matrix products slower by more than that saves, as would a shorter side than SIDE
# (benchmarks/RESULTS.md).
TILE_NUMEL = 1 << 20
SIDE = 128
# On a GPU, where each call costs, the tile is the whole weight, for as many samples at once as fit in this
# many numbers.
GPU_NUMEL = 1 << 26
# What it costs `instantiate` to pass over an entry of one sample's gradient, in multiply-adds of a matrix
# product.
PASSES = 18


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
    """The dtype of dots and running sums: never below float32 (a bfloat16 sum over 50 layers is off by 1
    %)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose_strategy(split: Split, positions: int, p: int, d: int, by_direction: bool = False) -> Strategy:
    """The cheapest strategy by operation count, for n train rows of `positions` positions and a (p, d)
    weight.

    `instantiate` needs no extra matrix product, but passes over every sample's gradient. `gram` needs two
    products for every pair of a train and a validation row, and spares the validation rows' gradient. Chosen
    by shape alone, never by a clock: strategies round differently, so a timed choice would break resuming and
    agreement between processes. by_direction: the direction itself is needed, for other micro-batches or
    to precondition it, and gram has none."""
    if by_direction:
        return "instantiate"
    gram = split.m * positions * (positions * (p + d) - p * d / split.n)
    instantiate = PASSES * p * d * split.directions
    return "gram" if gram < instantiate else "instantiate"


Tile = tuple[slice, slice]
Directions = Callable[[Tile], Tensor]
"""tile -> the directions' part in it, (k, r, c)."""


def direction_of(left: Tensor, right: Tensor, split: Split) -> Tensor:
    """The validation gradient(s) of one weight.

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


def products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out (b, r, c) = each left (b, T, r)ᵀ right (b, T, c), which is rounded to their dtype before it is
    widened."""
    if left.dtype == out.dtype:
        return torch.bmm(left.mT, right, out=out)
    return out.copy_(left.mT @ right)


def tiles(p: int, d: int, numel: int) -> Iterator[Tile]:
    """Rows and columns of the tiles of a (p, d) weight, about `numel` numbers each: cut along its longer
    side, so that the matrix products have two long ones."""
    longer, shorter = max(p, d), min(p, d)
    count = -(-longer // max(SIDE, numel // shorter))
    side, everything = -(-longer // count), slice(None)
    for start in range(0, longer, side):
        part = slice(start, min(start + side, longer))
        yield (part, everything) if p >= d else (everything, part)


def instantiate(
    left: Tensor, right: Tensor, directions: Directions, k: int, total: Tensor, fresh: bool, scratch: Scratch
) -> Tensor:
    """Build each G_i tile by tile, dot it with the k directions, add it to the sum.

    left (n, T, p), right (n, T, d), total (p, d) in the accumulation dtype. Returns dots (n, k); total grows
    by Σ_i G_i, or becomes it if fresh."""
    (n, _, p), d = left.shape, right.shape[2]
    on_cpu = total.device.type == "cpu"
    at_once = 1 if on_cpu else min(n, max(1, GPU_NUMEL // (p * d)))  # samples
    dots = total.new_zeros(n, k)
    for rows, columns in tiles(p, d, TILE_NUMEL if on_cpu else p * d):
        sum_tile = total[rows, columns]
        numel = at_once * sum_tile.numel()
        buffer = scratch.take("gradients", numel, total).view(at_once, *sum_tile.shape)
        direction = directions((rows, columns)).flatten(1)  # (k, r·c)
        for start in range(0, n, at_once):
            some = slice(start, min(start + at_once, n))
            first = fresh and start == 0
            # The first sample's gradient is the sum so far. (But no running sum whose differences are the
            # dots: an outlier would cost its neighbours their digits.)
            in_place = first and some.stop == 1 and sum_tile.is_contiguous()
            memory = sum_tile[None] if in_place else buffer[: some.stop - start]
            gradients = products(left[some, :, rows], right[some, :, columns], memory)  # (b, r, c)
            dots[some] += inner_products(gradients.flatten(1), direction)
            if not in_place:
                add_up(gradients, sum_tile, first)
    return dots


def inner_products(gradients: Tensor, directions: Tensor) -> Tensor:
    """(b, q), (k, q) -> (b, k)"""
    if gradients.device.type == "cpu":  # whose matrix products use one thread if the results are so few
        return torch.stack([torch.stack([torch.dot(g, v) for v in directions]) for g in gradients])
    return gradients @ directions.mT


def add_up(gradients: Tensor, total: Tensor, fresh: bool) -> None:
    """total (r, c) grows by the sum of the gradients (b, r, c), or becomes it."""
    if fresh:
        torch.sum(gradients, 0, out=total)
    else:
        total += gradients[0] if len(gradients) == 1 else gradients.sum(0)


def project(left: Tensor, right: Tensor, direction: Tensor, total: Tensor, fresh: bool) -> Tensor:
    """<left_iᵀ right_i, D> = Σ_t right_it · (left_it D): push the left side through the direction (k, p, d).

    Otherwise as `instantiate`.
    """
    add_gradient(left, right, total, fresh)
    projected = torch.einsum("ntp,kpd->kntd", left.to(total.dtype), direction)
    return torch.einsum("kntd,ntd->nk", projected, right.to(total.dtype))


def gram(left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, pairwise: bool) -> Tensor:
    """<G_i, G_j> = Σ_ts (left_i left_jᵀ)_ts (right_i right_jᵀ)_ts: no gradient is built at all.

    left (n, T, p), right (n, T, d), val_left (m, T', p), val_right (m, T', d). Returns dots (n, 1), or (n, m)
    if pairwise, in the accumulation dtype."""
    n, m = len(left), len(val_left)
    # In the wide dtype: in float16 these products overflow and flush, and no scale of the loss serves both.
    dtype = accumulation_dtype(left.dtype)
    grams = [
        train.flatten(0, 1).to(dtype) @ val.flatten(0, 1).to(dtype).mT  # (n·T, m·T')
        for train, val in ((left, val_left), (right, val_right))
    ]
    dots = grams[0].mul_(grams[1]).view(n, -1, m, val_left.shape[1]).sum((1, 3))  # (n, m)
    return dots if pairwise else dots.sum(1, keepdim=True)


def add_gradient(left: Tensor, right: Tensor, total: Tensor, fresh: bool) -> None:
    """total (p, d) grows by Σ_i left_iᵀ right_i, or becomes it: one product over all rows and positions."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right, beta=0 if fresh else 1)  # beta=0: whatever was in there is not read
    elif fresh:
        total.copy_(left.mT @ right)
    else:
        total += left.mT @ right


def contract(
    left: Tensor,
    right: Tensor,
    split: Split,
    strategy: Strategy,
    scratch: Scratch,
    keep: Keep | None = None,
    preconditioner: Preconditioner | None = None,
) -> tuple[Tensor, Tensor]:
    """A whole layer: left (n+m, T, p), right (n+m, T, d), train rows first; keep: for the direction, if there
    are several micro-batches (then m is 0 but in the first); preconditioner: of the weight, for the
    direction. With either not by gram.

    Returns the gradient of the train rows (p, d) and dots (n, k), in the accumulation dtype."""
    n = split.n
    train, val = (left[:n], right[:n]), (left[n:], right[n:])
    total = left.new_empty(left.shape[2], right.shape[2], dtype=accumulation_dtype(left.dtype))
    if strategy == "gram":
        add_gradient(*train, total, fresh=True)
        return total, gram(*train, *val, split.pairwise)

    def make() -> Tensor:
        return precondition_tiles(direction_of(*val, split), preconditioner, scratch)

    whole = None if keep is None else keep.direction(make)
    if strategy == "project":
        direction = make() if whole is None else whole
        return total, project(*train, direction, total, fresh=True)

    def directions(tile: Tile) -> Tensor:
        rows, columns = tile
        if whole is not None:
            return whole[:, rows, columns]
        val_left, val_right = (
            t[..., part] for t, part in zip(validation_factors(*val, split), tile, strict=True)
        )
        shape = (split.directions, val_left.shape[2], val_right.shape[2])
        memory = scratch.take("direction", shape[0] * shape[1] * shape[2], total).view(shape)
        direction = products(val_left, val_right, memory)
        if preconditioner is not None:
            memory = scratch.take("preconditioner", shape[1] * shape[2], total)
            preconditioner.apply(direction, tile, memory)
        return direction

    return total, instantiate(*train, directions, split.directions, total, fresh=True, scratch=scratch)


def precondition_tiles(direction: Tensor, preconditioner: Preconditioner | None, scratch: Scratch) -> Tensor:
    """A whole weight's direction (k, p, d) times its preconditioner, if there is one, in place."""
    if preconditioner is not None:
        _, p, d = direction.shape
        for rows, columns in tiles(p, d, TILE_NUMEL):
            tile = direction[:, rows, columns]
            preconditioner.apply(tile, (rows, columns), scratch.take("preconditioner", tile[0].numel(), tile))
    return direction


def contract_gradients(
    gradients: Tensor,
    split: Split,
    keep: Keep | None = None,
    preconditioner: Preconditioner | None = None,
) -> tuple[Tensor, Tensor]:
    """Small parameters, whose per-sample gradients (n+m, *shape) are simply there.

    Returns the gradient of the train rows (*shape) and dots (n, k), in the gradients' dtype.
    """
    train, val = gradients[: split.n], gradients[split.n :]

    def make() -> Tensor:
        direction = val if split.pairwise else val.sum(0, keepdim=True)
        return direction if preconditioner is None else preconditioner.apply(direction)

    direction = make() if keep is None else keep.direction(make)
    return train.sum(0), train.flatten(1) @ direction.flatten(1).mT
