"""`nn.Linear` and Hugging Face's `Conv1D`, which is a linear layer with its weight transposed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..contraction import (
    Split,
    Strategy,
    accumulation_dtype,
    contract,
    contract_gradients,
    direction_of,
)
from ..memory import Keep, Scratch
from ..preconditioner import Preconditioner
from ..step import LayerStep, Normalisation, routed_tensors
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
    tokens = (None, None) if route is None else (route.train_tokens, route.val_tokens)
    return ProbedLinear.apply(
        x,
        weight,
        layer.bias,
        layer_step.probe,
        *routed_tensors(route),
        *tokens,
        step.normalisation_of(x),
        step.split,
        strategy,
        transposed,
        compute_dtype(x),
        step.scratch,
        layer_step.keep("weight"),
        layer_step.keep("bias"),
        layer_step.preconditioner("weight"),
        layer_step.preconditioner("bias"),
    )


class ProbedLinear(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward makes the train rows' gradient of W and b and the dot products.

    probe (n, k) touches no output; the last five tensor arguments are those of a `TiedRoute`, or None. made:
    how x came out of a layer norm; then x is made again in the backward pass, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Any,  # Tensor, or None for an nn.Linear without one
        probe: Tensor,
        gathered: Tensor | None,
        picked: Tensor | None,
        whole: Tensor | None,
        train_tokens: Tensor | None,
        val_tokens: Tensor | None,
        made: Normalisation | None,
        split: Split,
        strategy: Strategy,
        transposed: bool,
        dtype: torch.dtype,
        scratch: Scratch,
        keep_weight: Keep | None,
        keep_bias: Keep | None,
        weight_preconditioner: Preconditioner | None,
        bias_preconditioner: Preconditioner | None,
    ) -> Tensor:
        ctx.keep_weight, ctx.keep_bias = keep_weight, keep_bias
        ctx.preconditioners = weight_preconditioner, bias_preconditioner
        ctx.split, ctx.strategy, ctx.transposed, ctx.scratch = split, strategy, transposed, scratch
        x = x.to(dtype)
        kept: tuple[Tensor | None, ...] = (x, None, None)
        if made is not None:
            kept = (made.x, made.weight, made.bias)
        ctx.norm = None if made is None else (made.shape, made.eps, made.dtype, dtype)
        ctx.save_for_backward(*kept, weight, train_tokens, val_tokens)
        with without_autocast(x):  # the very operations of the layers themselves
            matrix = weight.to(dtype)
            if transposed:
                output = torch.addmm(bias.to(dtype), x.reshape(-1, x.shape[-1]), matrix)
            else:
                output = nn.functional.linear(x, matrix, None if bias is None else bias.to(dtype))
            return as_shape(output, *x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        x, *norm, weight, train_tokens, val_tokens = ctx.saved_tensors
        if ctx.norm is not None:
            x = normalise(x, *norm, *ctx.norm)
        split, (needs_x, needs_weight, needs_bias, *_) = ctx.split, ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = gathered = picked = whole = None
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
                keep, (preconditioner, _) = ctx.keep_weight, ctx.preconditioners
                grad_weight, weight_dots = contract(
                    left, right, split, ctx.strategy, ctx.scratch, keep, preconditioner
                )
                dots.append(weight_dots)
                if train_tokens is not None:
                    gathered, picked = routed_gradients(
                        left, right, train_tokens, val_tokens, split, keep, preconditioner
                    )
                    grad_weight, whole = None, grad_weight
            if needs_bias:
                sums = backprops.sum(1, dtype=torch.promote_types(backprops.dtype, torch.float32))  # (n+m, p)
                grad_bias, bias_dots = contract_gradients(sums, split, ctx.keep_bias, ctx.preconditioners[1])
                dots.append(bias_dots)
        probe = torch.stack(dots).sum(0)
        return grad_x, grad_weight, grad_bias, probe, gathered, picked, whole, *(None,) * 12


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
    dtype: torch.dtype,
    wanted: torch.dtype,
) -> Tensor:
    """The output of a layer norm once more, to the last bit: in the dtype that it had, then in the wanted
    one."""
    with without_autocast(x):
        weight, bias = (
            None if p is None else p.to(torch.promote_types(p.dtype, dtype)) for p in (weight, bias)
        )
        return nn.functional.layer_norm(x.to(dtype), shape, weight, bias, eps).to(wanted)


def routed_gradients(
    left: Tensor,
    right: Tensor,
    train_tokens: Tensor,
    val_tokens: Tensor,
    split: Split,
    keep: Keep | None,
    preconditioner: Preconditioner | None,
) -> tuple[Tensor, Tensor]:
    """What a head whose weight is tied to an embedding returns through the `TiedRoute`.

    left (n+m, T, V), right (n+m, T, d). Returns gathered (k, n, L, d) and picked (n, U, d).
    """
    n = split.n
    picked = (left[:n, :, val_tokens].mT @ right[:n]).to(accumulation_dtype(left.dtype))
    if keep is None:
        gathered = gather(left[n:], right[n:], train_tokens, split)
        return gathered if preconditioner is None else preconditioner.apply(gathered, train_tokens), picked
    return keep.kept[keep.name][:, train_tokens], picked


def gather(left: Tensor, right: Tensor, tokens: Tensor, split: Split) -> Tensor:
    """Rows of the validation gradient at tokens (n, L), without making the whole of it.

    left (m, T, V), right (m, T, d): the validation rows. Returns (k, n, L, d).
    """
    rows = direction_of(left[:, :, tokens.flatten()], right, split)  # (k, n·L, d)
    return rows.view(-1, *tokens.shape, right.shape[2])
