"""Per-sample losses of a model that returns logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .row_maps import Indexed

IGNORE_INDEX = -100
_BY_TARGET = ContextVar("losses by target", default=False)


@contextmanager
def losses_by_target() -> Iterator[None]:
    """Let `per_sample_losses` and CrossEntropyHead return each row's loss in its parts (N, T) during the block.

    A part is what one target adds to the loss: its cross entropy over the row's number of targets, 0 where there is
    no target. Their sum over T is the row's loss. The head returns parts in passes without gradients alone.
    """
    token = _BY_TARGET.set(True)
    try:
        yield
    finally:
        _BY_TARGET.reset(token)


def are_by_target() -> bool:
    """Return whether losses are asked for by target: a loss function of one's own must follow `losses_by_target`."""
    return _BY_TARGET.get()


def losses_of(cross_entropies: Tensor, counts: Tensor) -> Tensor:
    """Return the losses of rows (N,), or by target (N, T) in `losses_by_target`.

    Args:
        cross_entropies: (N, T), 0 where there is no target.
        counts: (N,), the number of targets of each row.
    """
    return cross_entropies / counts[:, None] if are_by_target() else cross_entropies.sum(1) / counts


def per_sample_losses(
    model: Callable[[Any], Any], x: Any, y: Tensor, *, samples: Tensor | None = None
) -> Tensor:
    """Return one cross entropy per sample: the mean over its own targets, in nats.

    Args:
        model: returns logits (N, T, V) or (N, V), or a Hugging Face output that has them.
        x: what the model takes; its first dimension is the row.
        y: (N, T) or (N,), the target of each position, shifted already (y[t] is the token that follows x[t]);
            -100 for none.
        samples: (R,) or (R, T), the sample of each of the R rows or of each position; None: the rows are the
            samples.

    Returns:
        (N,) in float32 (float64 for a float64 model); in `losses_by_target` (N, T), with all positions of a sample in
        one dimension.

    Raises:
        TypeError: the model returns a tuple or a list.
        ValueError: logits and targets have different shapes, or a sample has no target.
    """
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
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, y.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    losses, targets = losses.view(len(y), -1), y.reshape(len(y), -1)
    if samples is not None:
        samples = samples.view(len(y), -1).expand_as(targets)
        by_sample = Indexed(samples, int(samples.max()) + 1)
        # to_rows pads short samples with zeros, and -100 must be the padding of the targets.
        losses, targets = by_sample.to_rows(losses), by_sample.to_rows(targets - IGNORE_INDEX) + IGNORE_INDEX
    return losses_of(losses, count_targets(targets))


def next_tokens(labels: Tensor) -> Tensor:
    """Return the targets of Hugging Face's labels (N, T): at each position the label of the next one, last -100."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def count_targets(targets: Tensor) -> Tensor:
    """Return the number of targets of each sample (N,), given targets (N, T).

    Raises:
        ValueError: a sample without a target.
    """
    counts = (targets != IGNORE_INDEX).sum(1)
    require(
        counts.min() > 0,
        "a sample has no target: every one of its labels is -100, so that its loss is undefined.",
    )
    return counts


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError with the message unless the condition holds.

    On a GPU reading the condition would wait for the device. So the device checks it, and the program ends
    with the message at the next synchronisation.

    Args:
        condition: a bool tensor of one element.
        message: of at most 254 characters, which is what PyTorch lets a device say.
    """
    assert len(message) < 255, f"a device cannot say that much: {message}"
    if condition.device.type == "cpu":
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
