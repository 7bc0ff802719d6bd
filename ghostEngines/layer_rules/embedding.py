"""`nn.Embedding`, of tokens and of positions."""

from typing import Any

from torch import Tensor, nn

from ..descriptions import Description, Rows
from ..errors import AttachError
from .registry import register_rule


def check_embedding(layer: nn.Embedding) -> None:
    """Raise AttachError for options that change the gradient, or the weight."""
    for option, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if getattr(layer, option) != off:
            raise AttachError(
                f"nn.Embedding with {option}={getattr(layer, option)} is not covered: use {option}={off}."
            )


@register_rule(nn.Embedding, check=check_embedding, lookup=True)
def embedding(layer: nn.Embedding, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = W[tokens]."""
    return {"weight": Rows(inputs[0], backprops, layer.padding_idx)}
