"""How many rows a model was called with."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

HUGGING_FACE = ("input_ids", "inputs_embeds")  # the inputs of a Hugging Face model that have the rows


def _tensors(values: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of all tensors with a first dimension, in order."""
    for name, value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value.items())


def input_shape(args: tuple[Any, ...], kwargs: dict[str, Any], rows: str | None) -> torch.Size:
    """Return the shape of the input whose first dimension is the row.

    rows: its name, a keyword argument or a key of a dictionary that the model takes. None: `input_ids` or
    `inputs_embeds` where there is one, else any tensor, if all have the same first dimension.

    Raises:
        ValueError: there is no such input, or it cannot be told which one has the rows.
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
