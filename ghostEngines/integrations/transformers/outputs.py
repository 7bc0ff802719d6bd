"""Outputs of the train rows, as a Trainer's loss function expects them of the model."""

from typing import Any

from torch import Tensor

from foundation.errors import UserError

from ...losses import IGNORE_INDEX
from .losses import RowLosses


def fused_output(own: RowLosses) -> Any:
    """Return what TRL's fused head returns, computed from the logits: the fused head has no gradient of single rows."""
    from trl.trainer.utils import FusedCausalLMOutput, entropy_from_logits

    targets, logits = own.targets[:, :-1], own.logits[:, :-1]  # the last position predicts nothing
    mask = targets != IGNORE_INDEX
    return FusedCausalLMOutput(
        log_probs=(
            -own.of_positions[:, :-1]
        ).requires_grad_(),  # so that it is seen what the loss makes of them
        entropy=entropy_from_logits(logits).masked_fill(~mask, 0),
        is_top1=(logits.argmax(-1) == targets) & mask,
        label_mask=mask,
    )


def compare(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise UserError unless the losses of the train rows are those that the model itself returns.

    Args:
        tolerance: relative.
    """
    if want.isfinite() and not (got - want).abs() <= tolerance * want.abs() + 1e-6:
        raise UserError(
            f"the model's own loss of the first batch is {want.item():.6g}, and the mean cross entropy of its next "
            f"tokens is {got.item():.6g}: the model has another loss, or its rows depend on each other or on padding, "
            "so that scores would not be of the loss that is trained on"
        )
