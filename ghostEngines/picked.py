"""What an output layer's part of a tied weight's gradient has in the rows of the validation rows' tokens.

The direction of these rows is known only after the output layer's backward pass, in that of the embedding.
"""

from dataclasses import dataclass

from torch import Tensor

from .contraction import Split

Part = tuple[slice, slice]  # train rows and their positions


@dataclass(frozen=True)
class Picked:
    """The rows themselves, summed over the positions."""

    rows: Tensor  # (n, U, d), U the validation rows' tokens

    def add(self, left: Tensor, right: Tensor, part: Part) -> None:
        """Add a part: left (g, t, U) and right (g, t, d) of the output layer's matrix."""
        self.rows[part[0]] += left.mT @ right

    def times(self, factor: Tensor) -> "Picked":
        """Multiply in place by a factor on all."""
        self.rows.mul_(factor)
        return self

    def dots(self, direction: Tensor) -> Tensor:
        """Return the inner products (n, k) with the direction (k, U, d)."""
        return self.rows.flatten(1) @ direction.flatten(1).mT


@dataclass(frozen=True)
class PickedByPosition:
    """The factors of the rows, which keep the positions apart."""

    left: Tensor  # (n, T, U)
    right: Tensor  # (n, T, d)

    def add(self, left: Tensor, right: Tensor, part: Part) -> None:
        """Store a part: left (g, t, U) and right (g, t, d) of the output layer's matrix."""
        self.left[part], self.right[part] = left, right

    def times(self, factor: Tensor) -> "PickedByPosition":
        """Multiply in place by a factor on all."""
        self.left.mul_(factor)
        return self

    def dots(self, direction: Tensor) -> Tensor:
        """Return the inner products of each position (n, T) with the direction (1, U, d)."""
        return (self.right @ direction[0].mT).mul_(self.left).sum(2)


def picking(split: Split, total: Tensor, tokens: int, positions: int) -> Picked | PickedByPosition:
    """Return zeros to which the parts are added.

    Args:
        total: of the weight's shape (V, d), device and dtype.
        tokens: U.
        positions: T, over all uses of the output layer.
    """
    n, d = split.n, total.shape[1]
    if not split.positions:
        return Picked(total.new_zeros(n, tokens, d))
    return PickedByPosition(total.new_zeros(n, positions, tokens), total.new_zeros(n, positions, d))
