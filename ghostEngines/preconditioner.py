"""Preconditioners: what an optimizer multiplies each entry of a gradient with.

An update moves a parameter by -lr·P∘g. To first order train row i then lowers the validation loss by
lr·<P∘∇ℓ_i, ∇L_val> = lr·<∇ℓ_i, P∘∇L_val>: the plain contraction with another direction. update_rules.py says
which P belongs to which optimizer.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Preconditioner(ABC):
    """P of one parameter."""

    @abstractmethod
    def shaped(self, shape: torch.Size) -> "Preconditioner":
        """Return the preconditioner for the parameter in another shape, such as a kernel as a matrix."""

    @abstractmethod
    def times(self, factor: float | Tensor) -> "Preconditioner":
        """Return the preconditioner multiplied by a number."""

    @abstractmethod
    def apply(self, direction: Tensor, part: Any = ..., memory: Tensor | None = None) -> Tensor:
        """Multiply a direction by P in place and return it.

        Args:
            direction: (..., *shape of the parameter[part]).
            part: an index into the parameter.
            memory: (numel of the parameter[part],) to work in.
        """


@dataclass(frozen=True)
class Uniform(Preconditioner):
    """The same number for every entry."""

    factor: float | Tensor

    def shaped(self, shape: torch.Size) -> Self:
        return self

    def times(self, factor: float | Tensor) -> "Uniform":
        return Uniform(self.factor * factor)

    def apply(self, direction: Tensor, part: Any = ..., memory: Tensor | None = None) -> Tensor:
        return direction.mul_(self.factor)


@dataclass(frozen=True)
class SecondMoment(Preconditioner):
    """factor / (sqrt(v / correction) + ε), with v the running mean of the squared gradients.

    It is 0 where v is exactly 0, as for a token that was never seen, or LoRA's first matrix after one step: the
    optimizer's first step there is of a size that the coming gradient alone decides, and not of factor / ε times it.
    """

    second_moment: Tensor  # v, of the parameter's shape
    correction: Tensor  # (scalar): 1 - β2^t after t updates
    eps: float
    factor: float | Tensor

    def shaped(self, shape: torch.Size) -> "SecondMoment":
        v = self.second_moment
        if isinstance(v, DTensor):  # divided among processes, as the parameter is between its uses
            v = v.full_tensor()
        return replace(self, second_moment=v.reshape(shape))

    def times(self, factor: float | Tensor) -> "SecondMoment":
        return replace(self, factor=self.factor * factor)

    def apply(self, direction: Tensor, part: Any = ..., memory: Tensor | None = None) -> Tensor:
        if isinstance(self.second_moment, DTensor):
            return self.shaped(self.second_moment.shape).apply(direction, part, memory)
        v = self.second_moment[part]
        denominator = torch.empty_like(v, dtype=direction.dtype) if memory is None else memory.view(v.shape)
        denominator.copy_(v).div_(self.correction).sqrt_().add_(self.eps).div_(self.factor)
        return direction.div_(denominator.masked_fill_(v == 0, torch.inf))
