"""Directions that are given: what per-sample gradients are contracted with, made by whoever likes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contraction import accumulation_dtype
from .preconditioner import Preconditioner

Direction = Mapping[str, Tensor]
"""By name of the parameter in the model, a tensor of its shape for each parameter that trains."""


@dataclass(frozen=True)
class Directions:
    """k directions by parameter, under the names by which the engine keeps them."""

    by_parameter: Mapping[str, tuple[Tensor, ...]]
    count: int

    @classmethod
    def of(cls, model: nn.Module, owner_of: Mapping[int, str], directions: list[Direction]) -> "Directions":
        """Check directions and order them by parameter; the tensors are not copied.

        Raises:
            ValueError: a parameter is missing or unknown, or a tensor is of another shape.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for direction in directions:
            if wrong := sorted(direction.keys() ^ trained.keys()):
                what = "lacks" if wrong[0] in trained else "has an unknown"
                raise ValueError(
                    f"the direction {what} '{wrong[0]}': it needs a tensor for each parameter that trains, by its "
                    "name in model.named_parameters()"
                )
            for name, parameter in trained.items():
                if direction[name].shape != parameter.shape:
                    raise ValueError(
                        f"the direction of '{name}' has shape {tuple(direction[name].shape)}, the parameter "
                        f"{tuple(parameter.shape)}"
                    )
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
