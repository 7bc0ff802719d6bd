"""What a manager does with the batches of a loop, whose form only the loop knows."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """Operations on batches of one form; their rows are what is scored."""

    def rows(self, batch: Any) -> int:
        """Return how many rows a batch has."""

    def joined(self, train: Any, validation: Any) -> Any:
        """Return the joint batch, the train rows first."""

    def first(self, batch: Any, rows: int) -> Any:
        """Return the batch of the first rows."""

    def losses(self, batch: Any) -> Tensor:
        """Call the model on a batch for a pass of the engine's own and return its rows' losses (N,)."""


class TensorBatches:
    """Batches that are tuples of tensors (N, ...), the arguments of a model that returns the losses of its rows."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def rows(self, batch: tuple[Tensor, ...]) -> int:
        return len(batch[0])

    def joined(self, train: tuple[Tensor, ...], validation: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(pair) for pair in zip(train, validation, strict=True))

    def first(self, batch: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
        return tuple(each[:rows] for each in batch)

    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        losses: Tensor = self.model(*batch)
        return losses
