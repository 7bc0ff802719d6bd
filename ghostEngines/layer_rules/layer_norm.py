"""`nn.LayerNorm`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..contraction import Split, accumulation_dtype, contract_gradients
from ..memory import Keep
from ..preconditioner import Preconditioner
from ..step import LayerStep, Normalisation
from .functions import without_autocast
from .registry import register_rule


@register_rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, layer_step: LayerStep, input: Tensor) -> Any:
    """input (n+m, ..., *normalized_shape) -> the same shape."""
    step, shape, eps = layer_step.enter(input), layer.normalized_shape, layer.eps
    keeps = layer_step.keep("weight"), layer_step.keep("bias")
    scales = layer_step.preconditioner("weight"), layer_step.preconditioner("bias")
    output = ProbedLayerNorm.apply(
        input, layer.weight, layer.bias, layer_step.probe, shape, eps, step.split, *keeps, *scales
    )
    made = Normalisation(input.detach(), layer.weight, layer.bias, shape, eps, output.dtype, output._version)
    step.remember_normalisation(output, made)
    return output


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
        keep_weight: Keep | None,
        keep_bias: Keep | None,
        weight_preconditioner: Preconditioner | None,
        bias_preconditioner: Preconditioner | None,
    ) -> Tensor:
        ctx.of_weight, ctx.of_bias = (keep_weight, weight_preconditioner), (keep_bias, bias_preconditioner)
        # Runs under the caller's autocast, whose choice of dtype differs between devices.
        output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.split, ctx.shape = split, shape
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        shape, dtype = ctx.shape, accumulation_dtype(x.dtype)
        grad_x = grad_weight = grad_bias = None
        dots = []
        with without_autocast(x):
            g, wide_x, mean, rstd = (t.to(dtype) for t in (backprops, x, mean, rstd))
            if needs_x:
                w, b = (None if p is None else p.to(dtype) for p in (weight, bias))
                grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                    g, wide_x, shape, mean, rstd, w, b, [True, False, False]
                )
                grad_x = grad_x.to(x.dtype)
            if needs_weight:
                per_sample = sum_positions(torch.sub(wide_x, mean).mul_(rstd).mul_(g), shape)
                grad_weight, weight_dots = contract_gradients(per_sample, ctx.split, *ctx.of_weight)
                dots.append(weight_dots)
            if needs_bias:
                grad_bias, bias_dots = contract_gradients(sum_positions(g, shape), ctx.split, *ctx.of_bias)
                dots.append(bias_dots)
        return grad_x, grad_weight, grad_bias, torch.stack(dots).sum(0), *(None,) * 7


def sum_positions(per_position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N, ..., *shape) -> (N, *shape)."""
    return per_position.reshape(len(per_position), -1, *shape).sum(1)
