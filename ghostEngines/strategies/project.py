"""project: multiply the train rows by the direction. Rarely the cheapest, but a simple cross-check, and what gives
the scores of single positions where gram costs more."""

from typing import Any

import torch
from torch import Tensor

from ..contraction import add_gradient
from ..memory import Scratch
from .registry import Problem, Strategy, register_strategy


@register_strategy
class Project(Strategy):
    """<left_iᵀ right_i, D> = Σ_t right_it · (left_it D).

    It costs 2·k·n·T·d·p extra operations and holds k·n·T·d numbers.
    """

    name = "project"
    automatic = False

    def extra_cost(self, problem: Problem) -> float:
        split = problem.split
        return split.directions * split.n * problem.positions * problem.p * problem.d

    def contract(
        self, left: Tensor, right: Tensor, against: Any, total: Tensor, fresh: bool, scratch: Scratch
    ) -> Tensor:
        add_gradient(left, right, total, fresh)
        projected = torch.einsum("ntp,kpd->kntd", left.to(total.dtype), against.whole())
        return torch.einsum("kntd,ntd->nk", projected, right.to(total.dtype))
