"""Memory that outlives one contraction: scratch memory, and directions kept for other micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


class Scratch:
    """Scratch memory, which the contractions of all layers and steps use in turn.

    On a CPU the first write to a fresh page of memory costs more than the computation that fills it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, numel: int, like: Tensor) -> Tensor:
        """Return (numel,) uninitialised numbers of the dtype and on the device of `like`.

        The next call for the same use may return the same memory.
        """
        if torch.compiler.is_compiling():  # the compiler plans the graph's memory itself
            return like.new_empty(numel)
        key = (use, like.dtype, like.device)
        if key not in self._buffers or len(self._buffers[key]) < numel:
            self._buffers[key] = like.new_empty(numel)
        return self._buffers[key][:numel]


T = TypeVar("T")


@dataclass(frozen=True)
class Keep:
    """Where one parameter's direction is kept.

    The first micro-batch makes the direction and all others use it. It includes the factor on the first one's
    loss. A direction that is given is there from the beginning, and includes no factor.
    """

    kept: dict[str, Any]  # the directions of the whole model, by `name`
    name: str
    first: bool  # the current micro-batch is the first

    def direction(self, make: Callable[[], T]) -> T:
        """Return the kept direction. The first micro-batch makes it, with `make`."""
        if self.first:
            self.kept[self.name] = make()
        elif self.name not in self.kept:
            raise RuntimeError(
                f"'{self.name}' has a gradient and no direction. If it had none in the first micro-batch, whose "
                "validation rows make the direction: run every layer in every micro-batch. If a direction is given: "
                'the optimizer has no second moment for it yet, and "auto" cannot weigh it'
            )
        found: T = self.kept[self.name]
        return found
