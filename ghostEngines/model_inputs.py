"""What a model was called with: its rows, and the samples in them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from foundation.granularity import Granularity

from .contraction import Split
from .passes import JointBatch
from .row_maps import Samples

HUGGING_FACE = ("input_ids", "inputs_embeds")  # the inputs of a Hugging Face model that have the rows


def joint_batch(
    samples: Samples,
    what: str,
    m: int,
    granularity: Granularity,
    input_shape: torch.Size,
    given: int = 0,
) -> JointBatch:
    """Divide the samples of a pass into train and validation samples.

    Args:
        what: "rows" or "samples", for the message.
        m: how many validation samples the pass has; they are the last ones.
        granularity: of the scores.
        given: how many directions are given.

    Raises:
        ValueError: there is no train sample; or with granularity "token" there are no positions.
    """
    n = samples.count - m
    if n <= 0:
        raise ValueError(
            f"the model was called with {samples.count} {what}, the last {m} of which are validation {what}: "
            f"there is no train {what[:-1]}. Append the validation {what} to the train {what}, or detach the "
            "engine."
        )
    positions = 0
    if granularity == "token":
        if len(input_shape) < 2:
            raise ValueError(
                f"granularity 'token' needs an input (rows, positions, ...), and the model's is {tuple(input_shape)}; "
                "name the input that has the positions, as in GradDotProdEngine(model, m, rows='input_ids')"
            )
        positions = input_shape[1]
    return JointBatch(Split(n, m, granularity == "pairwise", given, positions), samples, input_shape)


def samples_of(
    find: Callable[..., Tensor] | None, args: tuple[Any, ...], kwargs: dict[str, Any], input_shape: torch.Size
) -> Samples:
    """Return the samples of the model's input.

    Args:
        find: takes the model's arguments and returns the sample of each row (R,) or position (R, T). None:
            the rows are the samples.
    """
    if find is None:
        return Samples(input_shape[0])
    with torch.no_grad():
        return Samples.indexed(find(*args, **kwargs), input_shape)


def input_shape(args: tuple[Any, ...], kwargs: dict[str, Any], rows: str | None) -> torch.Size:
    """Return the shape of the input whose first dimension is the row.

    Args:
        rows: the name of that input: a keyword argument, or a key of a dictionary argument. None: `input_ids`
            or `inputs_embeds` if there is one, else any tensor, if all have the same first dimension.

    Raises:
        ValueError: there is no such input, or it is unknown which one has the rows.
    """
    found = list(_tensors([*((f"argument {i + 1}", each) for i, each in enumerate(args)), *kwargs.items()]))
    names = ", ".join(name for name, _ in found)
    for name in (rows,) if rows is not None else HUGGING_FACE:
        for key, tensor in found:
            if key == name:
                return tensor.shape
    if rows is not None:
        raise ValueError(
            f"rows={rows!r}: the model was called without such a tensor; it got {names or 'none'}"
        )
    if not found:
        raise ValueError("the model was called without a tensor, so that its number of rows is unknown")
    if len({tensor.shape[0] for _, tensor in found}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in found)
        raise ValueError(
            f"the model's inputs have different first dimensions ({shapes}): say which of them has the rows, as in "
            "GradDotProdEngine(model, m, rows='input_ids')"
        )
    return found[0][1].shape


def _tensors(values: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor that has a first dimension, in order."""
    for name, value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value.items())
