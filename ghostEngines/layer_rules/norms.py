"""Norms, recognised by what they compute: every family of models has classes of its own.

A module is a norm if on random inputs its output is x̂ · (c + w) + b over the last dimension, with c = 0 or
1. Here x̂ is x divided by its root mean square (RMSNorm, Zhang & Sennrich, arXiv 1910.07467), or x minus its
mean, divided by its standard deviation (LayerNorm).
"""

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..contraction import accumulation_dtype
from ..descriptions import Description, PerPosition
from .registry import LayerRule, anything_goes

SIZES = (1.0, 30.0, 3e-3)  # of the random inputs' entries; the last one has a mean square near ε
NEAR = 1e-5  # largest accepted relative difference between a float32 norm and the formula


@dataclass(frozen=True)
class Norm:
    """How a norm normalises."""

    centred: bool  # it subtracts the mean
    eps: float
    offset: float  # c
    scale: str  # the name of the parameter w
    shift: str | None  # the name of the parameter b; None: there is none

    def normalised(self, x: Tensor) -> Tensor:
        """Return x̂."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def describe_norm(
    norm: Norm, layer: nn.Module, inputs: tuple[Any, ...], backprops: Tensor
) -> dict[str, Description]:
    """Describe y = x̂ · (c + w) + b."""
    described: dict[str, Description] = {norm.scale: PerPosition(norm.normalised(inputs[0]) * backprops)}
    if norm.shift is not None:
        described[norm.shift] = PerPosition(backprops)
    return described


def norm_rule(layer: nn.Module) -> LayerRule | None:
    """Return the rule of a module that is a norm; None if it is not one."""
    norm = recognise(layer)
    if norm is None:
        return None
    names = (norm.scale,) if norm.shift is None else (norm.scale, norm.shift)
    return LayerRule(
        partial(describe_norm, norm),
        names,
        anything_goes,
        wide=True,
        again=True,
        expected=partial(expected, norm),
    )


def expected(norm: Norm, layer: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Return the output that the formula gives, in float32 or wider."""
    dtype = accumulation_dtype(inputs[0].dtype)
    parameters = {name: p.to(dtype) for name, p in layer._parameters.items() if p is not None}
    output = norm.normalised(inputs[0].to(dtype)) * (norm.offset + parameters[norm.scale])
    return output if norm.shift is None else output + parameters[norm.shift]


@torch.no_grad()
def recognise(layer: nn.Module) -> Norm | None:
    """Return how a module normalises, measured on random inputs; None if it is not a norm."""
    parameters = {name: p for name, p in layer._parameters.items() if p is not None}
    if not 1 <= len(parameters) <= 2 or next(layer.children(), None) is not None:
        return None
    if any(p.dim() != 1 for p in parameters.values()) or len({p.shape for p in parameters.values()}) > 1:
        return None
    takes = [p for p in inspect.signature(type(layer).forward).parameters.values() if p.name != "self"]
    if len(takes) != 1 or takes[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    names = list(parameters)
    for scale, shift in (
        ((names[0], names[1]), (names[1], names[0])) if len(names) == 2 else ((names[0], None),)
    ):
        found = _measured(layer, scale, shift, parameters[scale])
        if found is not None:
            return found
    return None


def _measured(layer: nn.Module, scale: str, shift: str | None, weight: Tensor) -> Norm | None:
    """Return how a module with these parameters normalises; None if it is not a norm."""
    generator, features = torch.Generator().manual_seed(0), len(weight)
    dtype = accumulation_dtype(weight.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor | None:
        probe = object.__new__(type(layer))
        probe.__dict__ = dict(layer.__dict__)
        probe._parameters = {scale: w} if shift is None else {scale: w, shift: b}  # type: ignore[dict-item]
        probe._buffers = {
            key: None if each is None else each.to("cpu", dtype) for key, each in layer._buffers.items()
        }
        try:
            output = type(layer).forward(probe, x)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None  # a norm would accept this input
        return output if isinstance(output, Tensor) and output.shape == x.shape else None

    zeros, ones = torch.zeros(features, dtype=dtype), torch.ones(features, dtype=dtype)
    x = draw(2, 3, features) + 0.5
    plain, without = run(x, ones, zeros), run(x, zeros, zeros)
    if plain is None or without is None:
        return None
    offset = 0.0 if without.abs().max() == 0 else 1.0
    for centred in (False, True):
        eps = _epsilon(run, offset, zeros, layer)
        if eps is None:
            continue
        norm = Norm(centred, eps, offset, scale, shift)
        if all(
            _agrees(run, norm, size * (draw(2, 3, features) + 0.5), draw(features), draw(features))
            for size in SIZES
        ):
            return norm
    return None


def _epsilon(run: Any, offset: float, zeros: Tensor, layer: nn.Module) -> float | None:
    """Measure ε on an input whose mean square is far below it; None if the output is not that of a norm."""
    x = zeros.expand(1, 1, -1).clone()
    x[..., 0], x[..., 1:2] = 1e-12, -1e-12
    output = run(x, zeros + 1 - offset, zeros)
    if output is None or not output.isfinite().all():
        return None
    ratio = (x[0, 0, 0] / output[0, 0, 0]).item() if output[0, 0, 0] != 0 else math.inf
    measured = ratio**2
    if not 0 < measured < 1:
        return None
    # If the module has a float attribute that agrees with the measurement, take its exact value.
    candidates = [each for each in vars(layer).values() if isinstance(each, float)]
    candidates += [torch.finfo(zeros.dtype).eps, float(f"{measured:.2g}")]
    close = [each for each in candidates if each > 0 and abs(each / measured - 1) < 1e-3]
    return close[0] if close else measured


def _agrees(run: Any, norm: Norm, x: Tensor, w: Tensor, b: Tensor) -> bool:
    """Return True if the module's output is that of the formula."""
    output = run(x, w, b)
    want = norm.normalised(x.double()) * (norm.offset + w.double())
    if norm.shift is not None:
        want = want + b.double()
    return output is not None and bool((output - want).abs().max() <= NEAR * want.abs().max())
