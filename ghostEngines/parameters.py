"""Other tensors in the places of a module's parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(parameters: Sequence[tuple[nn.Module, str]], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other tensors in the places of parameters while the block runs."""
    before = [module._parameters[key] for module, key in parameters]
    for (module, key), value in zip(parameters, values, strict=True):
        module._parameters[key] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for (module, key), parameter in zip(parameters, before, strict=True):
            module._parameters[key] = parameter
