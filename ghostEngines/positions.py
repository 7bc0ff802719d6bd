"""Positions: which position of the model's input each use of a weight is at, for granularity "token"."""

import torch
from torch import Tensor

from .descriptions import Description, Matrix, PerPosition, Rows

REMEDIES = 'freeze the parameter (requires_grad_(False)), or use another granularity than "token"'


def check_positions(found: tuple[int, ...], positions: int, what: str) -> int:
    """Return which of a layer's dimensions between the row and the features is the position.

    It is the only one with T entries. The others, such as the heads of attention, are of that position.

    Args:
        found: the sizes of these dimensions.
        positions: T, of the model's input.
        what: names the parameter, for the message.

    Raises:
        RuntimeError: none has T entries, or several have, so that it may be either.
    """
    if positions not in found:
        sizes = " x ".join(map(str, found)) or "no"
        raise RuntimeError(
            f"granularity 'token': {what} is used at {sizes} positions of each row, and the model's input has "
            f"{positions}: its part of the score belongs to none of them; {REMEDIES}"
        )
    if found.count(positions) > 1:
        raise RuntimeError(
            f"granularity 'token': {what} is used at {' x '.join(map(str, found))} places of each row, and it is "
            f"unknown which of them are the {positions} positions of the model's input: give rows of another length"
        )
    return found.index(positions)


def ordered_by_position(
    description: Description, shape: torch.Size, positions: int, what: str
) -> Matrix | PerPosition | Rows:
    """Return a description by sample with its positions last among its dimensions of positions, (N, ..., T, *).

    So uses that are joined one after the other have their entry u·T + t at position t.

    Args:
        shape: of the parameter.
        positions: T.
        what: names the parameter, for the message.

    Raises:
        RuntimeError: it has other positions than the model's input, or none.
    """

    def ordered(tensor: Tensor, features: int) -> Tensor:
        found = tuple(tensor.shape[1 : tensor.dim() - features])
        place = check_positions(found, positions, what)
        return tensor.movedim(1 + place, len(found))

    if isinstance(description, Matrix):
        return Matrix(ordered(description.left, 1), ordered(description.right, 1))
    if isinstance(description, PerPosition):
        return PerPosition(ordered(description.gradients, len(shape)))
    if isinstance(description, Rows):
        tokens, gradients = ordered(description.tokens, 0), ordered(description.gradients, 1)
        if tokens[0].numel() != positions:
            raise RuntimeError(
                f"granularity 'token': {what} is looked up {tokens[0].numel()} times in each row of {positions} "
                f"positions; {REMEDIES}"
            )
        return Rows(tokens, gradients, description.ignored)
    raise without_positions(what)


def without_positions(what: str) -> RuntimeError:
    """Return the error for a parameter whose gradient is known by sample alone."""
    return RuntimeError(
        f"granularity 'token': the gradient of {what} is known by row only, and not by position of the model's input; "
        f"{REMEDIES}"
    )


def add_uses(dots: Tensor, positions: int) -> Tensor:
    """Return (n, T), of the dot products of uses (n, ...·T) as `ordered_by_position` has them.

    Raises:
        RuntimeError: one of the uses, on which the loss does not depend, is at other positions.
    """
    if dots.shape[1] % positions:
        raise RuntimeError(
            f"granularity 'token': a shared parameter is looked up {dots.shape[1]} times in each row, and the model's "
            f"input has {positions} positions; {REMEDIES}"
        )
    return dots.view(len(dots), -1, positions).sum(1)
