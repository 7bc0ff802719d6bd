"""What a contraction strategy is, the registry of strategies, and the choice for a weight."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..contraction import Split
from ..memory import Scratch

# The cost of an entry of one sample's gradient (write it, read it for the dot product, add it to the sum), in
# multiply-adds of a matrix product.
PASSES = 40


@dataclass(frozen=True)
class Problem:
    """The sizes of one contraction."""

    split: Split  # n train and m validation rows
    positions: int  # T
    p: int  # the weight is (p, d)
    d: int


class Strategy(ABC):
    """One way to compute a weight's training gradient and its dot products."""

    name: ClassVar[str]
    by_direction: ClassVar[bool] = (
        True  # it contracts with the direction, which can be preconditioned and kept
    )
    automatic: ClassVar[bool] = True  # it may be chosen by its cost
    by_position: ClassVar[bool] = True  # it also does without the gradient of each position written out

    @abstractmethod
    def extra_cost(self, problem: Problem) -> float:
        """Return the cost besides the product that gives the gradient of all n+m rows.

        The unit is a multiply-add of a matrix product.
        """

    @abstractmethod
    def contract(
        self, left: Tensor, right: Tensor, against: Any, total: Tensor, fresh: bool, scratch: Scratch
    ) -> Tensor:
        """Add the gradient of the train rows to `total` (p, d), or write it there if `fresh`.

        Args:
            left, right: (n, T, p) and (n, T, d), the train rows.
            against: the direction (contraction.py): a `Whole`, or an object with the methods of `Validation`.
            total: (p, d), in the accumulation dtype.
            fresh: True if the content of `total` is to be ignored.

        Returns:
            The dot products (n, k), in the accumulation dtype.
        """

    def contract_by_position(
        self, left: Tensor, right: Tensor, against: Any, total: Tensor, fresh: bool, scratch: Scratch
    ) -> Tensor:
        """Contract with one direction, and return the dot products of each position (n, T).

        A position is a row of its own, of one position.
        """
        (n, positions, p), d = left.shape, right.shape[2]
        left, right = left.reshape(n * positions, 1, p), right.reshape(n * positions, 1, d)
        return self.contract(left, right, against, total, fresh, scratch).view(n, positions)


STRATEGIES: dict[str, Strategy] = {}


def register_strategy(kind: type[Strategy]) -> type[Strategy]:
    """Register a strategy under its name. Raises ValueError if the name is taken."""
    if kind.name in STRATEGIES:
        raise ValueError(f"there is a strategy {kind.name!r} already")
    STRATEGIES[kind.name] = kind()
    return kind


def choose_strategy(split: Split, positions: int, p: int, d: int, by_direction: bool = False) -> str:
    """Return the name of the cheapest strategy for n train rows of `positions` positions and a (p, d) weight.

    The choice depends on the shapes alone, never on measured times. Strategies round differently, so with a
    timed choice a resumed run, or another process, could compute other numbers.

    Args:
        by_direction: the direction itself is needed, for other micro-batches or to precondition it.
    """
    problem = Problem(split, positions, p, d)
    best, least = "", math.inf
    for name, strategy in STRATEGIES.items():  # a loop: torch.compile follows no min() with a key
        possible = strategy.by_position if split.positions else strategy.automatic
        if possible and (strategy.by_direction or not by_direction):
            cost = strategy.extra_cost(problem)
            if cost < least:
                best, least = name, cost
    return best
