"""Directions that are given: what per-sample gradients are contracted with, made by whoever likes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .contraction import accumulation_dtype
from .preconditioner import Preconditioner

Direction = Mapping[str, Tensor]
"""By name of the parameter in the model, a tensor of its shape for each parameter that trains."""


def by_name(direction: Direction | Mapping[str, Direction]) -> dict[str, Direction]:
    """Return directions by the caller's names; of a single one the name is "".

    Raises:
        ValueError: tensors and directions in one mapping.
    """
    are_tensors = {isinstance(each, Tensor) for each in direction.values()}
    if len(are_tensors) > 1:
        raise ValueError(
            "a direction is a tensor for each parameter, and several are one such mapping for each name"
        )
    return cast(dict[str, Direction], {"": direction} if are_tensors != {False} else dict(direction))


def _check_like(name: str, given: Tensor, parameter: Tensor) -> None:
    """Raise ValueError unless a tensor can be a parameter's direction."""
    for what, of_given, of_parameter, allowed in (
        ("shape", tuple(given.shape), tuple(parameter.shape), {tuple(parameter.shape)}),
        ("dtype", given.dtype, parameter.dtype, {parameter.dtype, accumulation_dtype(parameter.dtype)}),
        ("device", given.device, parameter.device, {parameter.device}),
    ):
        if of_given not in allowed:
            raise ValueError(f"the direction of '{name}' has {what} {of_given}, the parameter {of_parameter}")


def check_direction(model: nn.Module, direction: Direction) -> dict[str, nn.Parameter]:
    """Check a direction and return the parameters that train, by name.

    Raises:
        ValueError: a parameter is missing or unknown, or a tensor is of another shape, dtype or device.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if wrong := sorted(direction.keys() ^ trained.keys()):
        what = "lacks" if wrong[0] in trained else "has an unknown"
        raise ValueError(
            f"the direction {what} '{wrong[0]}': it needs a tensor for each parameter that trains, by its "
            "name in model.named_parameters()"
        )
    for name, parameter in trained.items():
        _check_like(name, direction[name], parameter)
    return trained


@dataclass(frozen=True)
class Directions:
    """k directions by parameter, under the names by which the engine keeps them."""

    by_parameter: Mapping[str, tuple[Tensor, ...]]
    count: int

    @classmethod
    def of(cls, model: nn.Module, owner_of: Mapping[int, str], directions: list[Direction]) -> "Directions":
        """Check directions and order them by parameter; the tensors are not copied.

        Raises:
            ValueError: a parameter is missing or unknown, or a tensor is of another shape, dtype or device.
        """
        (trained, *_) = [check_direction(model, direction) for direction in directions]
        return cls(
            {owner_of[id(p)]: tuple(each[name] for each in directions) for name, p in trained.items()},
            len(directions),
        )

    def preconditioned(self, preconditioners: Mapping[str, Preconditioner]) -> dict[str, Tensor]:
        """Return the directions (k, *shape) times P; as they are if there is no P at all.

        A parameter that has no P while others do is left out: it is an error if it has a gradient (Keep).
        """
        made = {}
        for name, each in self.by_parameter.items():
            wide = [one.detach().to(accumulation_dtype(one.dtype)) for one in each]
            if not preconditioners:
                made[name] = torch.stack(wide) if len(wide) > 1 else wide[0][None]
            elif name in preconditioners:
                made[name] = preconditioners[name].apply(torch.stack(wide))
        return made
