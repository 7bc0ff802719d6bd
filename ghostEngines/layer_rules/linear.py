"""`nn.Linear`, and Hugging Face's `Conv1D`, which is a linear layer with its weight transposed."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..descriptions import Description, Matrix, PerPosition
from .registry import register_rule


@register_rule(nn.Linear, product=True)
def linear(layer: nn.Linear, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = x Wᵀ + b, with W (p, d)."""
    return {"weight": Matrix(backprops, inputs[0]), "bias": PerPosition(backprops)}


@register_rule(Conv1D, product=True)
def conv1d(layer: Conv1D, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = x W + b, with W (d, p)."""
    return {"weight": Matrix(inputs[0], backprops), "bias": PerPosition(backprops)}
