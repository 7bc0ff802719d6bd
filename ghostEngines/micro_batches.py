"""The micro-batches that together make one optimizer step."""

import weakref
from typing import Any

import torch
from torch import Tensor

from .passes import Pass


class MicroBatches:
    """Track the position among the micro-batches of an optimizer step.

    The first micro-batch has the validation rows. Their gradient is kept, by parameter, for the others.
    """

    def __init__(self, count: int) -> None:
        self._usual = count  # of an update that `begin_update` says nothing about
        self.count = count  # G, of this update
        self.number = 0  # of the next micro-batch, from 0
        self.kept: dict[str, Any] = {}  # validation gradients, by parameter
        self.first: Pass | None = None  # the pass of the step's first micro-batch
        self._versions: list[int] = []  # of the parameters, at the first micro-batch
        # The gradients that the optimizer has used since the last pass, and their versions.
        self._used: list[tuple[weakref.ref[Tensor], int]] = []

    def begin_update(self, count: int) -> None:
        """Set the number of micro-batches of the coming update. Raises RuntimeError in the midst of another."""
        if self.number != 0:
            raise RuntimeError(self._incomplete("another update begins"))
        self.count = count

    def begin(self, versions: list[int]) -> None:
        """Check that a pass can be the next micro-batch.

        Args:
            versions: of the parameters, which must not change within a step.

        Raises:
            RuntimeError: they did.
        """
        if self.number == 0:
            self._versions = versions if self.count > 1 else []
            self._used = []
        elif self._versions != versions:
            raise RuntimeError(self._incomplete("the parameters were changed"))

    def end(self, pass_: Pass) -> None:
        """Advance after a backward pass; after the last one drop the kept gradients."""
        if self.number == 0:
            self.first = pass_
        self.number = (self.number + 1) % self.count
        if self.number == 0:
            self.kept.clear()  # in place: the graph still holds the dictionary
            self.count = self._usual

    def forget(self) -> None:
        """Make the next pass the first of its step."""
        self.number, self.first, self.count = 0, None, self._usual
        self.kept.clear()

    def check_complete(self, *_: Any) -> None:
        """Raise RuntimeError if micro-batches are missing; a hook before the optimizer's step."""
        if self.number != 0:
            raise RuntimeError(self._incomplete("the optimizer steps"))

    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Record which gradients the optimizer has used; a hook after its step."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = [each.grad for each in parameters if each.grad is not None]
        self._used = [(weakref.ref(gradient), gradient._version) for gradient in gradients]

    def check_before_step(self) -> None:
        """Raise RuntimeError unless the optimizer's coming update is that of whole passes it has not used yet."""
        gradients = [(used(), version) for used, version in self._used]
        if gradients and all(each is not None and each._version == version for each, version in gradients):
            raise RuntimeError(
                "the optimizer has stepped since the last pass: call exact_values() before it does"
            )
        if self.number != 0:
            raise RuntimeError(self._incomplete("exact_values() is called"))

    def _incomplete(self, what: str) -> str:
        return (
            f"{what} after {self.number} of {self.count} micro-batches: the gradient is that of "
            f"{self.number} and is divided by {self.count}. Make all of them, as at an epoch's end, or "
            "leave out this step: zero the gradients and call engine.forget_micro_batches()."
        )
