"""Subclasses of `nn.Linear` and `nn.Embedding` that compute what their parent does, or a multiple of it."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..contraction import accumulation_dtype
from ..descriptions import Description, Rows
from .registry import RULES, LayerRule

ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@torch.no_grad()
def subclass_rule(layer: nn.Module) -> LayerRule | None:
    """Return the rule of a subclass's instance, tested on random inputs; None if it has none."""
    takes = [p for p in inspect.signature(type(layer).forward).parameters.values() if p.name != "self"]
    if len(takes) != 1 or takes[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    if isinstance(layer, nn.Linear) and not layer._buffers:
        return replace(RULES[nn.Linear], expected=linear_output) if _is_linear(layer) else None
    if isinstance(layer, nn.Embedding) and set(layer._parameters) == {"weight"}:
        factor = _factor(layer)
        if factor is None:
            return None
        rule = replace(RULES[nn.Embedding], expected=partial(embedding_output, factor))
        return rule if factor == 1 else replace(rule, describe=partial(scaled_embedding, factor))
    return None


def scaled_embedding(
    factor: float, layer: nn.Embedding, inputs: tuple[Any, ...], backprops: Tensor
) -> dict[str, Description]:
    """Describe y = factor · W[tokens]."""
    backprops = backprops.to(accumulation_dtype(backprops.dtype))
    return {"weight": Rows(inputs[0], backprops * factor, layer.padding_idx)}


def _probe(layer: nn.Module, parameters: dict[str, Tensor | None], x: Tensor) -> Tensor | None:
    """Return the layer's output with other parameters."""
    probe = object.__new__(type(layer))
    probe.__dict__ = dict(layer.__dict__)
    probe._parameters = parameters  # type: ignore[assignment]
    probe._buffers = {key: None if each is None else each.cpu() for key, each in layer._buffers.items()}
    try:
        output = type(layer).forward(probe, x)
    except ERRORS:
        return None
    return output if isinstance(output, Tensor) else None


def _is_linear(layer: nn.Linear) -> bool:
    """Return True if a subclass computes what `nn.Linear` does."""
    generator = torch.Generator().manual_seed(0)
    p, d = layer.weight.shape
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 3, d), (p, d)))
    bias = None if layer.bias is None else torch.randn(p, generator=generator)
    output = _probe(layer, {"weight": weight, "bias": bias}, x)
    want = nn.functional.linear(x, weight, bias)
    return (
        output is not None
        and output.shape == want.shape
        and torch.allclose(output, want, rtol=1e-4, atol=1e-4)
    )


def _factor(layer: nn.Embedding) -> float | None:
    """Return the number that the parent's output is multiplied by; None if it is something else."""
    weight = layer.weight
    tokens = torch.arange(min(len(weight), 6)).view(1, -1)
    ones = _probe(layer, {"weight": torch.ones(weight.shape, dtype=weight.dtype)}, tokens)
    if ones is None or ones.shape != (*tokens.shape, weight.shape[1]):
        return None
    factor = ones.flatten()[0]
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    output = _probe(layer, {"weight": drawn}, tokens)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    same = output is not None and torch.allclose(output, drawn[tokens] * factor, rtol=tolerance, atol=0)
    return factor.item() if same and ones.eq(factor).all() else None


def linear_output(layer: nn.Linear, inputs: tuple[Any, ...]) -> Tensor:
    """Return the parent's output, in float32 or wider."""
    dtype = accumulation_dtype(inputs[0].dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return nn.functional.linear(inputs[0].to(dtype), layer.weight.to(dtype), bias)


def embedding_output(factor: float, layer: nn.Embedding, inputs: tuple[Any, ...]) -> Tensor:
    """Return the parent's output times the factor."""
    return layer.weight[inputs[0]] * factor
