"""`nn.LayerNorm`."""

from typing import Any

import torch
from torch import Tensor, nn

from ..descriptions import Description, PerPosition
from .registry import register_rule


@register_rule(nn.LayerNorm, wide=True, again=True)
def layer_norm(layer: nn.LayerNorm, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = x̂ · w + b."""
    (x,) = inputs
    _, mean, rstd = torch.native_layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return {
        "weight": PerPosition(torch.sub(x, mean).mul_(rstd).mul_(backprops)),
        "bias": PerPosition(backprops),
    }
