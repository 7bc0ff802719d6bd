"""gram ("ghost"): dot products without computing the gradient of any sample or of the validation rows."""

from typing import Any

from torch import Tensor

from ..contraction import accumulation_dtype, add_gradient
from ..memory import Scratch
from .registry import Problem, Strategy, register_strategy


@register_strategy
class Gram(Strategy):
    """<G_i, G_j> = Σ_ts (left_i left_jᵀ)_ts (right_i right_jᵀ)_ts.

    It costs 2·n·m·T²·(p+d) extra operations and holds 2·n·m·T² numbers, but saves the validation rows'
    gradient. It is good where T is small compared with p·d/(p+d).
    """

    name = "gram"
    by_direction = False

    def extra_cost(self, problem: Problem) -> float:
        split, positions, p, d = problem.split, problem.positions, problem.p, problem.d
        return split.m * positions * (positions * split.n * (p + d) - p * d)

    def contract(
        self, left: Tensor, right: Tensor, against: Any, total: Tensor, fresh: bool, scratch: Scratch
    ) -> Tensor:
        add_gradient(left, right, total, fresh)
        dots = total.new_zeros(len(left), against.k)
        for columns, val_left, val_right in against.parts():
            dots[:, columns] += gram(left, right, val_left, val_right, against.split.pairwise)
        return dots


def gram(left: Tensor, right: Tensor, val_left: Tensor, val_right: Tensor, pairwise: bool) -> Tensor:
    """Return the dot products of train rows with validation rows, (n, m) if pairwise, else their sums (n, 1).

    left (n, T, p), right (n, T, d), val_left (m, T', p), val_right (m, T', d).
    """
    n, m = len(left), len(val_left)
    # In the wide dtype: in float16 some of these products overflow and some underflow, whatever the loss
    # scale.
    dtype = accumulation_dtype(left.dtype)
    grams = [
        train.flatten(0, 1).to(dtype) @ val.flatten(0, 1).to(dtype).mT  # (n·T, m·T')
        for train, val in ((left, val_left), (right, val_right))
    ]
    dots = grams[0].mul_(grams[1]).view(n, -1, m, val_left.shape[1]).sum((1, 3))  # (n, m)
    return dots if pairwise else dots.sum(1, keepdim=True)
