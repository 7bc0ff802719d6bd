"""`nn.Linear` and Hugging Face's `Conv1D`, which is a linear layer with its weight transposed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..contraction import Split, Strategy, contract, contract_gradients, direction_of
from ..step import LayerStep
from .functions import as_shape, compute_dtype, without_autocast
from .registry import register_rule


@register_rule(nn.Linear)
def linear(layer: nn.Linear, step: LayerStep, input: Tensor) -> Any:
    """input (n+m, ..., d) -> (n+m, ..., p); the weight is (p, d)."""
    return _run(layer, step, input, layer.weight)


@register_rule(Conv1D)
def conv1d(layer: Conv1D, step: LayerStep, x: Tensor) -> Any:
    """x (n+m, ..., d) -> (n+m, ..., p); the weight is (d, p)."""
    return _run(layer, step, x, layer.weight)


def _run(layer: nn.Linear | Conv1D, layer_step: LayerStep, x: Tensor, weight: Tensor) -> Any:
    step = layer_step.enter(x)
    transposed = type(layer) is Conv1D
    positions = x.shape[1:-1].numel()
    strategy = step.strategy_for(positions, *weight.shape)
    route = layer_step.take_route()
    routed = (
        (None,) * 4 if route is None else (route.gathered, route.picked, route.train_tokens, route.val_tokens)
    )
    return ProbedLinear.apply(
        x, weight, layer.bias, layer_step.probe, *routed, step.split, strategy, transposed, compute_dtype(x)
    )


class ProbedLinear(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward makes the train rows' gradient of W and b and the dot products.

    probe (n, k) touches no output; the last four tensor arguments are those of a `TiedRoute`, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        gathered: Tensor | None,
        picked: Tensor | None,
        train_tokens: Tensor | None,
        val_tokens: Tensor | None,
        split: Split,
        strategy: Strategy,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.split, ctx.strategy, ctx.transposed = split, strategy, transposed
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, train_tokens, val_tokens)
        with without_autocast(x):  # the very operations of the layers themselves
            matrix, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            if transposed:
                output = torch.addmm(bias, x.reshape(-1, x.shape[-1]), matrix)
            else:
                output = nn.functional.linear(x, matrix, bias)
            return as_shape(output, *x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, train_tokens, val_tokens = ctx.saved_tensors
        split, (needs_x, needs_weight, needs_bias, *_) = ctx.split, ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = gathered = picked = None
        dots = []
        with without_autocast(x):
            rows = len(x)
            if needs_x:
                matrix = weight.to(x.dtype)
                grad_x = backprops @ (matrix.mT if ctx.transposed else matrix)
            activations, backprops = (
                x.reshape(rows, -1, x.shape[-1]),
                backprops.reshape(rows, -1, backprops.shape[-1]),
            )
            if needs_weight:
                left, right = (activations, backprops) if ctx.transposed else (backprops, activations)
                grad_weight, weight_dots, direction = contract(left, right, split, ctx.strategy)
                dots.append(weight_dots)
                if train_tokens is not None:
                    if direction is None:
                        direction = direction_of(left[split.n :], right[split.n :], split)
                    gathered, picked = routed_gradients(left, right, direction, train_tokens, val_tokens)
            if needs_bias:
                sums = backprops.sum(1, dtype=torch.promote_types(backprops.dtype, torch.float32))  # (n+m, p)
                grad_bias, bias_dots = contract_gradients(sums, split)
                dots.append(bias_dots)
        return grad_x, grad_weight, grad_bias, torch.stack(dots).sum(0), gathered, picked, *(None,) * 6


def routed_gradients(
    left: Tensor, right: Tensor, direction: Tensor, train_tokens: Tensor, val_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """What a head whose weight is tied to an embedding returns through the `TiedRoute`.

    left (n+, T, V), right (n+, T, d): at least the train rows, in the scale of the joint loss. direction (k,
    V, d). Returns gathered (k, n, L, d) and picked (n, U, d)."""
    n = len(train_tokens)
    picked = left[:n, :, val_tokens].mT @ right[:n]
    return direction[:, train_tokens], picked.to(direction.dtype)
