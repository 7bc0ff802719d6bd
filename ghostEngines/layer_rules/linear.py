"""`nn.Linear`, and Hugging Face's `Conv1D`, a linear layer with a transposed weight.

`Conv1D` is registered by name, so that the engine does not need transformers.
"""

from typing import Any

from torch import Tensor, nn

from ..descriptions import Description, Matrix, PerPosition
from .registry import register_rule


@register_rule(nn.Linear, product=True)
def linear(layer: nn.Linear, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = x Wᵀ + b, with W (p, d)."""
    return {"weight": Matrix(backprops, inputs[0]), "bias": PerPosition(backprops)}


@register_rule("transformers.pytorch_utils.Conv1D", product=True)
def conv1d(layer: nn.Module, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = x W + b, with W (d, p)."""
    return {"weight": Matrix(inputs[0], backprops), "bias": PerPosition(backprops)}
