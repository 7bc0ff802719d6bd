"""AdamW's preconditioner: dot products that predict the effect of an AdamW update instead of a gradient step.

AdamW moves a parameter by the gradient times P = 1 / (sqrt(v̂) + ε), elementwise, where v̂ is the
bias-corrected running mean of its squared gradients (Kingma & Ba, arXiv 1412.6980, Algorithm 1; Loshchilov &
Hutter, arXiv 1711.05101). To first order and without weight decay, train row i lowers the validation loss by
lr · <P∘∇ℓ_i, ∇L_val> = lr · <∇ℓ_i, P∘∇L_val>: the same contraction with another direction. v̂ is the value
before this step's update. Momentum, which spreads an update over later steps, is ignored.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import AttachError

KINDS = (torch.optim.AdamW, torch.optim.Adam)


@dataclass(frozen=True)
class Preconditioner:
    """P of one parameter."""

    second_moment: Tensor  # v, of the parameter's shape
    correction: Tensor  # (scalar): 1 - β2^t after t updates
    eps: float

    def shaped(self, shape: torch.Size) -> "Preconditioner":
        """Return the preconditioner for the parameter in another shape, such as a kernel as a matrix."""
        return Preconditioner(self.second_moment.reshape(shape), self.correction, self.eps)

    def apply(self, direction: Tensor, part: Any = ..., memory: Tensor | None = None) -> Tensor:
        """Multiply a direction by P in place and return it.

        Args:
            direction: (..., *shape of v[part]).
            part: an index into the parameter.
            memory: (numel of v[part],) to work in.
        """
        v = self.second_moment[part]
        denominator = torch.empty_like(v, dtype=direction.dtype) if memory is None else memory.view(v.shape)
        denominator.copy_(v).div_(self.correction).sqrt_().add_(self.eps)
        return direction.div_(denominator)


class SecondMoments:
    """The second moments of an optimizer, which exist after its first update."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._has_stepped = False

    def preconditioners(self) -> dict[int, Preconditioner] | None:
        """Return the preconditioners by id of the parameter; None before the first update."""
        self._has_stepped = self._has_stepped or has_stepped(self._optimizer)
        return preconditioners(self._optimizer) if self._has_stepped else None


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the optimizer has made an update.

    It may have skipped every step so far. Waits for the device if the optimizer counts its steps there.
    """
    return any(state["step"] > 0 for state in optimizer.state.values())


def preconditioners(optimizer: torch.optim.Optimizer) -> dict[int, Preconditioner]:
    """Return the preconditioners of the parameters that have been updated, by id of the parameter."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                correction = 1 - group["betas"][1] ** state["step"].double()
                found[id(parameter)] = Preconditioner(state["exp_avg_sq"], correction, group["eps"])
    return found


def check_adamw(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """Return the optimizer; raise AttachError unless it is an AdamW with moments of whole parameters."""
    if optimizer is None:
        raise AttachError('direction "adamw" needs the optimizer: attach it with the optimizer')
    if type(optimizer) not in KINDS:
        raise AttachError(
            f'direction "adamw" is about torch.optim.AdamW (or Adam), the optimizer is '
            f'{type(optimizer).__name__}: use that, or direction "gradient"'
        )
    if any(group["amsgrad"] for group in optimizer.param_groups):
        raise AttachError('direction "adamw" does not cover amsgrad=True: leave it out')
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise AttachError('direction "adamw" needs whole parameters, and these are divided among processes')
    return optimizer
