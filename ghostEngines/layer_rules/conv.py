"""Convolutions `nn.Conv1d` and `nn.Conv2d`, and `nn.GroupNorm`: channels before positions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..descriptions import Description, Matrix, PerPosition, PerSample
from ..errors import AttachError
from .registry import register_rule


def check_convolution(layer: nn.Conv1d | nn.Conv2d) -> None:
    """Raise AttachError for a padding other than zeros."""
    if layer.padding_mode != "zeros":
        raise AttachError(
            f"{type(layer).__name__} with padding_mode={layer.padding_mode!r} is not covered: use 'zeros'."
        )


def patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Return the kernel's input at each position: x (N, C, ...) -> (N, C·k, positions)."""
    flat = x.dim() == 3
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        total = [spread * (size - 1) for spread, size in zip(dilation, kernel, strict=True)]
        sides = [side for each in reversed(total) for side in (each // 2, each - each // 2)]
        x = F.pad(x, sides)
    elif layer.padding != "valid":
        assert not isinstance(layer.padding, str)
        x = F.pad(x, [side for each in reversed(layer.padding) for side in (each, each)])
    if flat:
        x = x[:, :, None]
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(x, kernel, dilation=dilation, stride=stride)


@register_rule(nn.Conv1d, nn.Conv2d, check=check_convolution, product=True)
def convolution(
    layer: nn.Conv1d | nn.Conv2d, inputs: tuple[Any, ...], backprops: Tensor
) -> dict[str, Description]:
    """Describe a convolution as a matrix product with the patches of its input."""
    seen, gradients = patches(layer, inputs[0]), backprops.flatten(2)  # (N, C·k, L), (N, O, L)
    bias = PerPosition(gradients.mT)
    if layer.groups == 1:
        return {"weight": Matrix(gradients.mT, seen.mT), "bias": bias}
    seen, grouped = (each.unflatten(1, (layer.groups, -1)) for each in (seen, gradients))
    return {"weight": PerSample((grouped @ seen.mT).reshape(len(seen), *layer.weight.shape)), "bias": bias}


@register_rule(nn.GroupNorm, wide=True)
def group_norm(layer: nn.GroupNorm, inputs: tuple[Any, ...], backprops: Tensor) -> dict[str, Description]:
    """Describe y = x̂ · w + b, where x̂ is x normalised over each sample's groups of channels."""
    normalised = F.group_norm(inputs[0], layer.num_groups, eps=layer.eps)
    return {
        "weight": PerPosition(torch.movedim(normalised * backprops, 1, -1)),
        "bias": PerPosition(torch.movedim(backprops, 1, -1)),
    }
