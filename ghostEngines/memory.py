"""What outlives one contraction: scratch memory, and directions that are kept for other micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


class Scratch:
    """Memory that one contraction after another uses, over all layers and steps: on a CPU the first touch of
    fresh pages costs more than what is then written to them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, numel: int, like: Tensor) -> Tensor:
        """(numel,) with any content, of the dtype and device of `like`; the next call for the same use may
        give the same memory."""
        if torch.compiler.is_compiling():  # the compiler plans the memory of its graph itself
            return like.new_empty(numel)
        key = (use, like.dtype, like.device)
        if key not in self._buffers or len(self._buffers[key]) < numel:
            self._buffers[key] = like.new_empty(numel)
        return self._buffers[key][:numel]


T = TypeVar("T")


@dataclass(frozen=True)
class Keep:
    """The place of one parameter's direction that is made with the first of several micro-batches and serves
    them all; kept: of the whole model, by name. It holds the common factor on that micro-batch's loss."""

    kept: dict[str, Any]
    name: str
    first: bool

    def direction(self, make: Callable[[], T]) -> T:
        """What `make` makes with the first micro-batch, as kept."""
        if self.first:
            self.kept[self.name] = make()
        elif self.name not in self.kept:
            raise RuntimeError(
                f"'{self.name}' has a gradient in a later micro-batch, and had none in the first, whose "
                "validation rows would have made its direction: run every layer in every micro-batch"
            )
        found: T = self.kept[self.name]
        return found
