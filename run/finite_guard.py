"""Stop a run at the first non-finite loss or gradient, without a device sync in every step."""

import torch
from torch import Tensor

from data_processing.blocks import Batch
from run.processes import World


class NonFiniteLoss(RuntimeError):
    """A loss or its gradient is NaN or infinite; the parameters are those before that step."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step  # None for an evaluation


class FiniteGuard:
    """Skip every update from the first non-finite step on, without a device sync; `check` syncs and raises.

    From that step on every gradient is made NaN, and the optimizer skips a step with such a gradient.
    """

    def __init__(self, device: torch.device, world: World, scaling: bool) -> None:
        """scaling: a gradient scaler is active, so that a gradient may overflow and only its step is skipped."""
        self.world, self.scaling = world, scaling
        self._poison = torch.zeros((), device=device)  # NaN from the first bad step on
        self._pending: list[tuple[int, list[int], list[str], Tensor, Tensor, Tensor]] = []
        # step, samples, domains, losses, whether dot products are finite, norm

    def spoil(self, gradient: Tensor, losses: Tensor, dots: Tensor | None) -> Tensor:
        """Make one of the step's gradients NaN if a loss or dot product of this or an earlier step is non-finite.

        Those of all processes count. Validation rows may overflow where train rows do not.

        Returns:
            (2,): a sum that is non-finite if a loss is, and one that is if a dot product is.
        """
        of_losses = losses.detach().float().sum() * 0
        of_dots = torch.zeros_like(of_losses) if dots is None else dots.float().sum() * 0
        signals = self.world.sum(torch.stack([of_losses, of_dots]))
        gradient.add_(self._poison + signals.sum())
        return signals

    def record(
        self, step: int, batches: list[Batch], losses: Tensor, signals: Tensor, norm: Tensor
    ) -> Tensor:
        """Note what `check` will report of a step, and return whether the optimizer must skip it (scalar).

        Args:
            losses: of all rows of this process.
            signals: what `spoil` returned.
            norm: of the gradient (scalar).
        """
        skipped = ~norm.isfinite()
        bad = ~signals[0].isfinite()
        if not self.scaling:
            bad = bad | skipped
        self._poison = torch.where(bad, torch.nan, self._poison)
        samples = [sample for batch in batches for sample in batch.sample_ids.tolist()]
        domains = [domain for batch in batches for domain in batch.domains]
        self._pending.append((step, samples, domains, losses.detach(), signals[1], norm))
        return skipped

    def check(self) -> None:
        """Raise NonFiniteLoss if a step since the last check was non-finite. Waits for the device."""
        if self._poison.isnan():
            for step, samples, domains, losses, of_dots, norm in self._pending:
                of_all = self.world.gather(None if losses.isfinite().all() else losses.tolist())
                bad = [each for each in of_all if each is not None]
                if bad:
                    raise self._error(step, samples, domains, f"the loss is not finite (per row: {bad[0]})")
                if not (self.scaling or of_dots.isfinite()):
                    seen = "a dot product with the validation gradient is not finite"
                    raise self._error(step, samples, domains, seen)
                if not (self.scaling or norm.isfinite()):
                    raise self._error(step, samples, domains, f"the norm of the gradient is {norm.item()}")
        self._pending.clear()

    def _error(self, step: int, samples: list[int], domains: list[str], seen: str) -> NonFiniteLoss:
        of_all = self.world.gather((samples, domains))
        all_samples = [sample for part, _ in of_all for sample in part]
        names = dict.fromkeys(domain for _, part in of_all for domain in part)
        return NonFiniteLoss(
            f"step {step}: {seen}; samples {all_samples} of {', '.join(names)}. The run stops with the "
            "parameters before this step: lower "
            "--learning_rate, lengthen --warmup_step, or look at these samples",
            step,
        )
