"""A loss or gradient that is not finite stops the run, without a look at the device in every step."""

import torch
from torch import Tensor

from dataloader import Batch


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; the parameters are those before that step.

    step: which one, None for an evaluation."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class FiniteGuard:
    """Keeps the parameters as they were before the first step that is not finite, until somebody looks.

    From that step on it makes every gradient NaN, and the optimizer leaves such a step out; all of this
    happens on the device. `check` reads the outcome, which waits for the device, and raises.

    scaling: whether a gradient scaler is at work, under which a gradient may overflow and only its step is
    left out."""

    def __init__(self, device: torch.device, scaling: bool) -> None:
        self.scaling = scaling
        self._poison = torch.zeros((), device=device)  # NaN from the first bad step on
        self._pending: list[tuple[int, Batch, Tensor, Tensor]] = []  # step, batch, losses, norm

    def spoil(self, gradient: Tensor, losses: Tensor, dots: Tensor | None) -> None:
        """Makes one of the step's gradients NaN if losses or dot products are not finite (validation rows may
        overflow where train rows do not), or those of an earlier step were not."""
        signal = self._poison + losses.detach().sum() * 0
        gradient.add_(signal if dots is None else signal + dots.sum() * 0)

    def record(self, step: int, batch: Batch, losses: Tensor, norm: Tensor) -> Tensor:
        """losses: of all rows; norm (): of the gradient. Returns whether the step must be left out, ()."""
        skipped = ~norm.isfinite()
        bad = ~losses.detach().isfinite().all()
        if not self.scaling:
            bad = bad | skipped
        self._poison = torch.where(bad, torch.nan, self._poison)
        self._pending.append((step, batch, losses.detach(), norm))
        return skipped

    def check(self) -> None:
        """NonFiniteLoss if a step since the last check was not finite."""
        if self._poison.isnan():
            for step, batch, losses, norm in self._pending:
                if not losses.isfinite().all():
                    raise self._error(step, batch, f"the loss is not finite (per row: {losses.tolist()})")
                if not (self.scaling or norm.isfinite()):
                    raise self._error(step, batch, f"the norm of the gradient is {norm.item()}")
        self._pending.clear()

    @staticmethod
    def _error(step: int, batch: Batch, seen: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"step {step}: {seen}; samples {batch.sample_ids.tolist()} of {', '.join(batch.domains)}. The "
            "run stops with the parameters before this step: lower --learning_rate, lengthen --warmup_step, "
            "or look at these samples",
            step,
        )
