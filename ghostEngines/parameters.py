"""Other tensors in the places of a module's parameters."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

Places = Sequence[tuple[nn.Module, str]]
"""Modules and the keys of parameters there."""


@contextmanager
def swapped(parameters: Places, values: Sequence[Tensor]) -> Iterator[None]:
    """Put other tensors in the places of parameters while the block runs."""
    before = [module._parameters[key] for module, key in parameters]
    for (module, key), value in zip(parameters, values, strict=True):
        module._parameters[key] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for (module, key), parameter in zip(parameters, before, strict=True):
            module._parameters[key] = parameter


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the places of a model's parameters while the block runs; a tied one in all its places.

    The parameters themselves are not touched, so that they are as before afterwards, bit by bit.

    Args:
        values: by name in `model.named_parameters()`.
    """
    all_places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            all_places[id(parameter)].append((module, key))
    places, tensors = [], []
    for name, parameter in model.named_parameters():
        if name in values:
            places += all_places[id(parameter)]
            tensors += [values[name]] * len(all_places[id(parameter)])
    with swapped(places, tensors):
        yield
