"""Forward-mode differentiation of a model's losses: <z, ∇ℓ_i> of all rows in one forward pass.

A forward pass over dual numbers θ + εz gives ℓ_i and its derivative along z. No layer rule takes part in it, so it is
exact for every layer, and a check of the rules as well. Nothing is kept for a backward pass.

Attention runs in its mathematical form, because the fused ones have no forward-mode derivative. It is cut into pieces
of the queries, so that no (T, T) tensor of all heads is in memory.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .own_passes import NO_DERIVATIVE, Losses, own_pass, per_sample, per_target, widened

ATTENTION_NUMEL = 1 << 22  # about how many attention weights are in memory at a time


def directional_derivatives(
    model: nn.Module, tangents: Mapping[str, Tensor], losses: Losses, *, by_target: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the per-sample losses (n,) and their derivatives <z, ∇ℓ_i> (n,); or both by target (n, T).

    Parameters in half precision are widened for the pass. Parameters without a tangent have the tangent zero.

    Args:
        model: it is as it was before, afterwards.
        tangents: z, by name of the parameter, of its shape.
        losses: calls the model and returns its per-sample losses.
        by_target: True for the parts of each loss (own_passes.per_target), each with its own derivative.

    Raises:
        RuntimeError: the losses do not depend on the parameters, or an operation of the model has no forward-mode
            derivative; the message names it.
        ValueError: the losses are not one for each sample, or not by target.
    """
    # With gradients enabled a model runs as in training. No graph is made, because no parameter requires one.
    with ExitStack() as stack:
        stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(ForwardMode())
        # For attention inside PyTorch's own functions, which ForwardMode does not see.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_slow_encoders())
        duals = widened(model)
        for name, tangent in tangents.items():
            duals[name] = forward_ad.make_dual(duals[name], tangent.to(duals[name].dtype))
        stack.enter_context(own_pass(model, duals))
        try:
            result = forward_ad.unpack_dual((per_target if by_target else per_sample)(losses))
        except NotImplementedError as error:
            raise RuntimeError(
                "exact values, and so audits, need a forward-mode derivative of each operation of the model "
                f"(audit_interval=0 leaves audits out): {error}"
            ) from error
    if result.tangent is None:
        raise RuntimeError(f"the losses have no derivative by the model's parameters: {NO_DERIVATIVE}")
    # Gradient checkpointing may let inputs require gradients, with which nobody goes on.
    return result.primal.detach(), result.tangent.detach()


class ForwardMode(TorchFunctionMode):
    """Let operations have the forward-mode derivatives that agree with what a backward pass would compute.

    Fused attention has none, so that other operations take its place. In a block without gradients
    (torch.no_grad()) nothing has a derivative.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            func = attention
        if func is torch._C._set_grad_enabled:  # what torch.no_grad() calls, at both of its ends
            torch._C._set_fwd_grad_enabled(*args)
            return func(*args)
        with nullcontext() if torch.is_grad_enabled() else forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


@contextmanager
def _slow_encoders() -> Iterator[None]:
    """Leave out the fast path of nn.TransformerEncoder in eval mode, which has no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    length, of_keys = query.shape[-2], key.shape[-2]
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    rows = math.prod(query.shape[:-2])
    piece = max(1, ATTENTION_NUMEL // max(1, rows * of_keys))
    parts = []
    for start in range(0, max(1, length), piece):  # of no queries one piece, which is empty
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
