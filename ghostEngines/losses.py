"""Per-sample losses of a model that returns logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100


def per_sample_losses(model: Callable[[Any], Any], x: Any, y: Tensor) -> Tensor:
    """One cross entropy per row: the mean over the row's own targets, in nats.

    x: what the model takes, with the sample first. y (N, T) or (N,): the target of each position, shifted
    already (y[t] is the token that follows x[t]), -100 where there is none. The model returns logits (N, T,
    V) or (N, V), or a Hugging Face output that has them. Returns (N,) in float32 (float64 for a float64
    model). Raises ValueError for a row without any target."""
    output = model(x)
    if isinstance(output, tuple | list):
        raise TypeError(
            f"the model returned a {type(output).__name__} of {len(output)}: per_sample_losses takes "
            "logits, or an output that has them as .logits; pass a function that picks them"
        )
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.shape[:-1] != y.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, got "
            f"{tuple(y.shape)}"
        )
    targets = y.reshape(len(y), -1)
    counts = count_targets(targets)
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(len(y), -1).sum(1) / counts


def count_targets(targets: Tensor) -> Tensor:
    """targets (N, T) -> (N,): how many positions of each row have a target. Raises ValueError for a row
    without any."""
    counts = (targets != IGNORE_INDEX).sum(1)
    require(
        counts.min() > 0,
        "a row has no target: every one of its labels is -100, so that its loss is undefined.",
    )
    return counts


def require(condition: Tensor, message: str) -> None:
    """ValueError unless the condition (a bool tensor of one element) holds. On a GPU, where reading it would
    wait for the device, the device itself checks it, and the program ends with the message at the next point
    of synchronisation."""
    if condition.device.type == "cpu":
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
