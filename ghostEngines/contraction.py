"""One weight gradient, and its per-sample dot products on the way.

Every linear-like layer has, for sample i, the gradient  G_i = left_iᵀ right_i  of shape (p, d): for
`nn.Linear` left are the backprops and right the activations, for a transposed weight the other way round. The
step needs Σ_i G_i over the train rows anyway; attribution wants <G_i, D> as well, where D is the direction,
by default the validation gradient.

Index letters: n train rows, m validation rows, T positions, k directions (1, or m for pairwise scores), p and
d the two sides of the weight. All functions here are pure but for `total`, which they add to.

    strategy     extra operations       extra memory      good when
    gram         2·n·m·T²·(d+p)         2·n·m·T²          T is small against d·p/(d+p)
    project      2·k·n·T·d·p            n·T·d             rarely; a simple cross-check
    instantiate  none                   two tiles         T is large

`gram` works on the validation rows themselves, the others on the direction made from them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Strategy = Literal["gram", "project", "instantiate"]
STRATEGIES: tuple[Strategy, ...] = ("gram", "project", "instantiate")

# `instantiate` walks the weight in tiles of about this many numbers. Smaller ones would stay in a faster
# cache, but make the matrix products slower by more than that saves (benchmarks/RESULTS.md).
TILE_NUMEL = 1 << 22
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


def choose_strategy(split: Split, positions: int, p: int, d: int) -> Strategy:
    """The cheapest strategy by operation count, for n train rows of `positions` positions and a (p, d)
    weight.

    `instantiate` needs no extra matrix product, but passes over every sample's gradient. `gram` needs two
    products for every pair of a train and a validation row, and spares the validation rows' gradient. Chosen
    by shape alone, never by a clock: strategies round differently, so a timed choice would break resuming and
    agreement between processes."""
    gram = split.m * positions * (positions * (p + d) - p * d / split.n)
    instantiate = PASSES * p * d * split.directions
    return "gram" if gram < instantiate else "instantiate"


def direction_of(left: Tensor, right: Tensor, split: Split) -> Tensor:
    """The validation gradient(s) of one weight.

    left (m, T, p), right (m, T, d): the validation rows. Returns (k, p, d) in the accumulation dtype: Σ_j
    left_jᵀ right_j, never (Σ_j left_j)ᵀ(Σ_j right_j), or with pairwise each left_jᵀ right_j."""
    if not split.pairwise:
        left, right = left.flatten(0, 1)[None], right.flatten(0, 1)[None]
    return (left.mT @ right).to(accumulation_dtype(left.dtype))


def instantiate(left: Tensor, right: Tensor, direction: Tensor, total: Tensor) -> Tensor:
    """Build each G_i tile by tile, dot it with the direction, add it to the sum.

    left (n, T, p), right (n, T, d), direction (k, p, d), total (p, d): the latter two in the accumulation
    dtype. Returns dots (n, k); total grows by Σ_i G_i."""
    n, _, p = left.shape
    k, _, d = direction.shape
    rows = max(1, TILE_NUMEL // d)
    dots = total.new_zeros(n, k)
    for start in range(0, p, rows):
        tile = slice(start, start + rows)
        tile_direction = direction[:, tile].flatten(1)  # (k, rows·d)
        for i in range(n):
            # Not a running sum whose differences are the dots: an outlier would cost its neighbours their
            # digits.
            gradient = (left[i, :, tile].mT @ right[i]).to(total.dtype)  # (rows, d)
            dots[i].addmv_(tile_direction, gradient.view(-1))
            total[tile] += gradient
    return dots


def project(left: Tensor, right: Tensor, direction: Tensor, total: Tensor) -> Tensor:
    """<left_iᵀ right_i, D> = Σ_t right_it · (left_it D): push the left side through the direction.

    Shapes as for `instantiate`.
    """
    add_gradient(left, right, total)
    projected = torch.einsum("ntp,kpd->kntd", left.to(total.dtype), direction)
    return torch.einsum("kntd,ntd->nk", projected, right.to(total.dtype))


def gram(
    left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, total: Tensor, pairwise: bool
) -> Tensor:
    """<G_i, G_j> = Σ_ts (left_i left_jᵀ)_ts (right_i right_jᵀ)_ts: no gradient is built at all.

    left (n, T, p), right (n, T, d), val_left (m, T', p), val_right (m, T', d). Returns dots (n, 1), or (n, m)
    if pairwise; total grows by Σ_i G_i."""
    add_gradient(left, right, total)
    n, m = len(left), len(val_left)
    # In the wide dtype: in float16 these products overflow and flush, and no scale of the loss serves both.
    grams = [
        train.flatten(0, 1).to(total.dtype) @ val.flatten(0, 1).to(total.dtype).mT  # (n·T, m·T')
        for train, val in ((left, val_left), (right, val_right))
    ]
    dots = grams[0].mul_(grams[1]).view(n, -1, m, val_left.shape[1]).sum((1, 3))  # (n, m)
    return dots if pairwise else dots.sum(1, keepdim=True)


def add_gradient(left: Tensor, right: Tensor, total: Tensor) -> None:
    """total (p, d) += Σ_i left_iᵀ right_i as one product over all rows and positions."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right)
    else:
        total += left.mT @ right


def contract(left: Tensor, right: Tensor, split: Split, strategy: Strategy) -> tuple[Tensor, Tensor]:
    """A whole layer: left (n+m, T, p), right (n+m, T, d), train rows first.

    Returns the gradient of the train rows (p, d) and dots (n, k), in the accumulation dtype."""
    n = split.n
    train, val = (left[:n], right[:n]), (left[n:], right[n:])
    total = left.new_zeros(left.shape[2], right.shape[2], dtype=accumulation_dtype(left.dtype))
    if strategy == "gram":
        return total, gram(*train, *val, total, split.pairwise)
    contraction = {"project": project, "instantiate": instantiate}[strategy]
    return total, contraction(*train, direction_of(*val, split), total)


def contract_gradients(gradients: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Small parameters, whose per-sample gradients (n+m, *shape) are simply there.

    Returns the gradient of the train rows (*shape) and dots (n, k), in the gradients' dtype.
    """
    train, val = gradients[: split.n], gradients[split.n :]
    direction = val if split.pairwise else val.sum(0, keepdim=True)
    return train.sum(0), train.flatten(1) @ direction.flatten(1).mT
