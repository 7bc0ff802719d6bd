"""Checks of the backward pass: there was one, of the joint loss times a factor, and of nothing else."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .losses import require
from .passes import Pass
from .precision import autocast_of
from .tapped import TappedLayer
from .uses import Uses

LossScale = float | Callable[[], float | Tensor]


def check_autocast(weight: Tensor, of_forward: torch.dtype | None) -> None:
    """Raise RuntimeError if `backward()` runs inside torch.autocast and the forward pass did not.

    Args:
        weight: of the model.
        of_forward: the dtype of autocast in the forward pass; None: it was off.
    """
    now = autocast_of(weight)
    if now is not None and now != of_forward and weight.dtype != torch.float64:
        raise RuntimeError(
            "backward() runs inside torch.autocast, and the forward pass ran outside of it: the layers' own "
            f"backwards would be cast to {now}. Call backward() outside of the context."
        )


def check_backward(pass_: Pass, loss_scale: LossScale | None) -> None:
    """Check which multiple of the joint loss was differentiated.

    Args:
        loss_scale: the factor on the joint loss that the loop declared; None: 1.

    Raises:
        RuntimeError: not exactly one backward pass.
        ValueError: another combination of the losses or, with several micro-batches, another factor.
    """
    if len(pass_.loss_gradients) != 1:
        raise RuntimeError(
            f"{len(pass_.loss_gradients)} backward passes went through the losses of one forward pass: "
            "the dot products are exact for one backward() of engine.joint_loss(losses)"
        )
    scale = pass_.scale_probe.grad
    assert scale is not None
    (got,) = pass_.loss_gradients
    want = (scale * pass_.row_weights()).to(got.dtype)
    # Losses in half precision have gradients in half precision.
    rtol = max(1e-4, 4 * torch.finfo(got.dtype).eps)
    require(
        torch.isclose(got, want, rtol=rtol, atol=0, equal_nan=True).all(),
        "the losses were differentiated in another combination than engine.joint_loss(losses): call "
        "backward() on it alone, times any factor",
    )
    if pass_.micro_batches > 1:
        _check_factor(scale, pass_.micro_batches, loss_scale)


def _check_factor(got: Tensor, micro_batches: int, loss_scale: LossScale | None) -> None:
    """Check that the loop has not divided the joint loss by the number of micro-batches a second time."""
    scale = 1.0 if loss_scale is None else loss_scale
    want = torch.as_tensor(scale() if callable(scale) else scale, dtype=got.dtype, device=got.device)
    require(
        torch.isclose(got, want, rtol=1e-4, atol=0, equal_nan=True),
        "engine.joint_loss(losses) was multiplied by another factor than attach() was told: it is divided by "
        f"the {micro_batches} micro-batches already. Do not divide it again, or name the factor: "
        "attach(..., loss_scale=...).",
    )


def check_calls(layers: Sequence[TappedLayer], uses: Mapping[int, Uses]) -> None:
    """Raise RuntimeError for a layer that ran several times in compiled code.

    Args:
        uses: by group of layers, the calls that ran outside of compiled code.
    """
    for tapped in layers:
        linked = uses[tapped.group].calls if tapped.group in uses else 0
        if tapped.calls > 1 and linked < tapped.calls:
            raise RuntimeError(
                f"layer '{tapped.name}' of type {type(tapped.layer).__name__} ran {tapped.calls} times in compiled "
                "code: there its dot products are exact for one call only. Leave its block uncompiled."
            )
