"""Forward-mode differentiation of a model's losses: <z, ∇ℓ_i> of all rows in one forward pass.

A forward pass over dual numbers θ + εz gives ℓ_i and its derivative along z. No layer rule takes part in it, so it is
exact for every layer, and a check of the rules as well. Nothing is kept for a backward pass.

Attention runs in its mathematical form, because the fused ones have no forward-mode derivative. It is cut into pieces
of the queries, so that no (T, T) tensor of all heads is in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .contraction import accumulation_dtype
from .parameters import replaced

ATTENTION_NUMEL = 1 << 22  # about how many attention weights are in memory at a time


def directional_derivatives(
    model: nn.Module, tangents: Mapping[str, Tensor], losses: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the per-sample losses (n,) and their derivatives <z, ∇ℓ_i> (n,).

    Parameters in half precision are widened for the pass. Parameters without a tangent have the tangent zero.

    Args:
        model: its parameters are as they were before, afterwards.
        tangents: z, by name of the parameter, of its shape.
        losses: calls the model and returns its per-sample losses.

    Raises:
        RuntimeError: the losses do not depend on the parameters, or an operation of the model has no forward-mode
            derivative; the message names it.
    """
    with torch.no_grad(), forward_ad.dual_level(), DifferentiableAttention():
        duals = {}
        for name, parameter in model.named_parameters():
            values = parameter.detach().to(accumulation_dtype(parameter.dtype))
            if name in tangents:
                values = forward_ad.make_dual(values, tangents[name].to(values.dtype))
            duals[name] = values
        with replaced(model, duals):
            result = forward_ad.unpack_dual(losses())
    if result.tangent is None:
        raise RuntimeError(
            "the losses have no derivative by the model's parameters: `losses` must call the model that the engine is "
            "attached to, and not a copy, and must not detach what it returns"
        )
    return result.primal, result.tangent


class DifferentiableAttention(TorchFunctionMode):
    """Replace PyTorch's fused attention by operations that have a forward-mode derivative."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return scaled dot product attention, of the arguments of PyTorch's function.

    Raises:
        ValueError: it has dropout.
    """
    if dropout_p > 0:
        raise ValueError(f"attention with dropout_p={dropout_p}: the losses would be of a random model")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    length, of_keys = query.shape[-2], key.shape[-2]
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    rows = query[..., 0, 0].numel()
    piece = max(1, ATTENTION_NUMEL // max(1, rows * of_keys))
    parts = []
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        seen = min(stop, of_keys) if is_causal else of_keys  # no query of the piece sees more keys
        scores = query[..., start:stop, :] @ key[..., :seen, :].mT
        if is_causal:
            later = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).triu(start + 1)
            scores = scores.masked_fill(later, -torch.inf)
        if attn_mask is not None:
            part = attn_mask[..., start:stop, :] if attn_mask.shape[-2] > 1 else attn_mask
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        weights = scores.softmax(-1)
        if attn_mask is not None:  # a query that sees no key attends to none, as in PyTorch's function
            weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
        parts.append(weights @ value[..., :seen, :])
    return torch.cat(parts, -2)
