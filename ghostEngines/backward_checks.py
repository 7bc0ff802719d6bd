"""Checks of a backward pass: it was one, of the joint loss times a factor, and of nothing else."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .losses import require
from .passes import Pass

LossScale = float | Callable[[], float | Tensor]


def check_backward(
    pass_: Pass, gradients: Sequence[Tensor], micro_batches: int, loss_scale: LossScale | None
) -> None:
    """Check which multiple of the joint loss was differentiated.

    Args:
        gradients: of the losses (N,), one for each backward pass that went through them.
        micro_batches: how many make one optimizer step.
        loss_scale: the factor that the loop declared; None: none.

    Raises:
        RuntimeError: not exactly one backward pass.
        ValueError: another combination of the losses, or with several micro-batches another factor.
    """
    if len(gradients) != 1:
        raise RuntimeError(
            f"{len(gradients)} backward passes went through the losses of one forward pass: "
            "the dot products are exact for one backward() of engine.joint_loss(losses)"
        )
    scale = pass_.scale_probe.grad
    assert scale is not None
    (got,) = gradients
    want = (scale * pass_.row_weights()).to(got.dtype)
    rtol = max(1e-4, 4 * torch.finfo(got.dtype).eps)  # losses of half precision have such a gradient
    require(
        torch.isclose(got, want, rtol=rtol, atol=0, equal_nan=True).all(),
        "the losses were differentiated in another combination than engine.joint_loss(losses): call "
        "backward() on it alone, times any factor",
    )
    if micro_batches > 1:
        _check_factor(scale, micro_batches, loss_scale)


def _check_factor(got: Tensor, micro_batches: int, loss_scale: LossScale | None) -> None:
    """Check the factor: joint_loss divides by the number of micro-batches, and a loop must not do so again."""
    scale = 1.0 if loss_scale is None else loss_scale
    want = torch.as_tensor(scale() if callable(scale) else scale, dtype=got.dtype, device=got.device)
    require(
        torch.isclose(got, want, rtol=1e-4, atol=0, equal_nan=True),
        "engine.joint_loss(losses) was multiplied by another factor than attach() was told: it is divided by the "
        f"number of micro-batches ({micro_batches}) already. Do not divide the loss again (accelerate does: "
        "gradient_accumulation_steps=1 there), or say so with attach(..., loss_scale=...), a number or a function "
        "such as a gradient scaler's get_scale.",
    )


def check_calls(layers: Sequence[tuple[str, str, int, int]]) -> None:
    """Raise RuntimeError for a layer that ran several times in compiled code.

    layers: name, type, how often it ran, and how many of these calls were linked outside of compiled code."""
    for name, kind, calls, linked in layers:
        if calls > 1 and linked < calls:
            raise RuntimeError(
                f"layer '{name}' of type {kind} ran {calls} times in compiled "
                "code: there its dot products are exact for one call only. Leave its block uncompiled."
            )
