"""`nn.LayerNorm`."""

from typing import Any

import torch
from torch import Tensor, nn

from ..contraction import Split, accumulation_dtype, contract_gradients
from ..step import LayerStep
from .autocast import without_autocast
from .registry import register_rule


@register_rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, layer_step: LayerStep, x: Tensor) -> Tensor:
    """x (n+m, ..., *normalized_shape) -> the same shape."""
    step = layer_step.enter(x)
    return ProbedLayerNorm.apply(x, layer.weight, layer.bias, step.probe, layer.normalized_shape, layer.eps, step.split)


class ProbedLayerNorm(torch.autograd.Function):
    """y = x̂ · w + b, with per-sample gradients Σ_t g_t ∘ x̂_t for w and Σ_t g_t for b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        shape: tuple[int, ...],
        eps: float,
        split: Split,
    ) -> Tensor:
        # Runs under the caller's autocast, whose choice of dtype differs between devices.
        output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.split, ctx.shape = split, shape
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dtype = accumulation_dtype(x.dtype)
        gradients = []
        with without_autocast(x):
            wide = [None if t is None else t.to(dtype) for t in (backprops, x, mean, rstd, weight, bias)]
            backprops, wide_x, mean, rstd, weight, bias = wide
            grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                backprops, wide_x, ctx.shape, mean, rstd, weight, bias, [needs_x, False, False]
            )
            if needs_weight:
                per_position = backprops * ((wide_x - mean) * rstd)
                gradients.append(_sum_positions(per_position, ctx.shape))
            if needs_bias:
                gradients.append(_sum_positions(backprops, ctx.shape))
            contracted = [contract_gradients(gradient, ctx.split) for gradient in gradients]
        grads = iter([grad for grad, _ in contracted])
        dots = sum(dots for _, dots in contracted)
        return (
            grad_x.to(x.dtype) if needs_x else None,
            next(grads) if needs_weight else None,
            next(grads) if needs_bias else None,
            dots,
            *(None,) * 3,
        )


def _sum_positions(per_position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N, ..., *shape) -> (N, *shape)."""
    return per_position.reshape(len(per_position), -1, *shape).sum(1)
