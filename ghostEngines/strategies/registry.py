"""What a contraction strategy is, which there are, and which one is chosen for a weight."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..contraction import Split
from ..memory import Scratch

# What it costs to pass over an entry of one sample's gradient (write it, read it for the dot product, add it
# to the sum), in multiply-adds of a matrix product.
PASSES = 18


@dataclass(frozen=True)
class Problem:
    """The sizes of one contraction: n train and m validation rows of `positions`, a weight (p, d)."""

    split: Split
    positions: int
    p: int
    d: int


class Strategy(ABC):
    """One way to get a weight's training gradient and its dot products.

    name: as it is asked for. by_direction: it contracts with the direction itself, which may then be
    preconditioned, and kept for other micro-batches. automatic: it may be chosen by its cost.
    """

    name: ClassVar[str]
    by_direction: ClassVar[bool] = True
    automatic: ClassVar[bool] = True

    @abstractmethod
    def extra_cost(self, problem: Problem) -> float:
        """Return what it costs on top of the product that gives the gradient of all n+m rows, in
        multiply-adds of a matrix product."""

    @abstractmethod
    def contract(
        self, left: Tensor, right: Tensor, against: Any, total: Tensor, fresh: bool, scratch: Scratch
    ) -> Tensor:
        """Add the gradient of the train rows to `total` (p, d), or write it there if `fresh`.

        Args:
            left, right: (n, T, p) and (n, T, d), the train rows.
            against: what they are contracted with (contraction.py): a `Whole`, or something with the methods
            of
                `Validation`.
            total: in the accumulation dtype.

        Returns:
            The dot products (n, k), in the accumulation dtype.
        """


STRATEGIES: dict[str, Strategy] = {}


def register_strategy(kind: type[Strategy]) -> type[Strategy]:
    """Make a strategy known under its name. Raises ValueError if the name is taken."""
    if kind.name in STRATEGIES:
        raise ValueError(f"there is a strategy {kind.name!r} already")
    STRATEGIES[kind.name] = kind()
    return kind


def choose_strategy(split: Split, positions: int, p: int, d: int, by_direction: bool = False) -> str:
    """Return the name of the cheapest strategy for n train rows of `positions` positions and a (p, d) weight.

    Chosen by shape alone, never by a clock: strategies round differently, so a timed choice would break
    resuming and agreement between processes. by_direction: the direction itself is needed, for other
    micro-batches or to precondition it.
    """
    problem = Problem(split, positions, p, d)
    best, least = "", math.inf
    for name, strategy in STRATEGIES.items():  # a loop: torch.compile follows no min() with a key
        if strategy.automatic and (strategy.by_direction or not by_direction):
            cost = strategy.extra_cost(problem)
            if cost < least:
                best, least = name, cost
    return best
