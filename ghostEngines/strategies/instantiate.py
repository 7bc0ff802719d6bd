"""instantiate: compute each sample's gradient tile by tile, dot it with the direction, add it to the sum."""

from typing import Any

import torch
from torch import Tensor

from .. import contraction
from ..contraction import products, tiles
from ..memory import Scratch
from . import registry
from .registry import Problem, Strategy, register_strategy

# On a GPU, where each call has a cost, a tile is the whole weight, for as many samples at once as have this
# many numbers.
GPU_NUMEL = 1 << 26


@register_strategy
class Instantiate(Strategy):
    """Compute all per-sample gradients, without an extra matrix product; good where T is large.

    Each sample's gradient is written and read several times. On a CPU it needs 1+k tiles of extra memory.
    """

    name = "instantiate"
    by_position = False  # a row's gradient has all of its positions in it

    def extra_cost(self, problem: Problem) -> float:
        split = problem.split
        return registry.PASSES * split.n * problem.p * problem.d * split.directions

    def contract(
        self, left: Tensor, right: Tensor, against: Any, total: Tensor, fresh: bool, scratch: Scratch
    ) -> Tensor:
        (n, _, p), d = left.shape, right.shape[2]
        on_cpu = total.device.type == "cpu"
        at_once = 1 if on_cpu else min(n, max(1, GPU_NUMEL // (p * d)))  # samples
        dots = total.new_zeros(n, against.k)
        for rows, columns in tiles(p, d, contraction.TILE_NUMEL if on_cpu else p * d):
            sum_tile = total[rows, columns]
            numel = at_once * sum_tile.numel()
            buffer = scratch.take("gradients", numel, total).view(at_once, *sum_tile.shape)
            direction = against.tile((rows, columns)).flatten(1)  # (k, r·c)
            for start in range(0, n, at_once):
                some = slice(start, min(start + at_once, n))
                first = fresh and start == 0
                # The first sample's gradient is the sum so far. (Do not compute dots as differences of a
                # running sum: one large gradient would cancel the next one's digits.)
                in_place = first and some.stop == 1 and sum_tile.is_contiguous()
                memory = sum_tile[None] if in_place else buffer[: some.stop - start]
                gradients = products(left[some, :, rows], right[some, :, columns], memory)  # (b, r, c)
                dots[some] += inner_products(gradients.flatten(1), direction)
                if not in_place:
                    add_up(gradients, sum_tile, first)
        return dots


def inner_products(gradients: Tensor, directions: Tensor) -> Tensor:
    """Return the inner products (b, k) of (b, q) and (k, q)."""
    if gradients.device.type == "cpu":  # its matrix products use a single thread for so few results
        return torch.stack([torch.stack([torch.dot(g, v) for v in directions]) for g in gradients])
    return gradients @ directions.mT


def add_up(gradients: Tensor, total: Tensor, fresh: bool) -> None:
    """Add the sum of the gradients (b, r, c) to total (r, c), or write it there if fresh."""
    if fresh:
        torch.sum(gradients, 0, out=total)
    else:
        total += gradients[0] if len(gradients) == 1 else gradients.sum(0)
