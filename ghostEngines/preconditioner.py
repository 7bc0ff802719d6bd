"""AdamW's preconditioner: dot products that speak of an AdamW update, not of a gradient step.

AdamW moves a parameter by the gradient times P = 1 / (sqrt(v̂) + ε), elementwise, where v̂ is the
bias-corrected running mean of its squared gradients (Kingma & Ba, arXiv 1412.6980, Algorithm 1; Loshchilov &
Hutter, arXiv 1711.05101). So the fall of the validation loss that train row i causes is, to first order and
without the decay, lr · <P∘∇ℓ_i, ∇L_val> = lr · <∇ℓ_i, P∘∇L_val>: the same contraction with another direction.
v̂ is the one before this step's update; momentum, which spreads an update over the steps that follow, is not
looked at."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import AttachError

KINDS = (torch.optim.AdamW, torch.optim.Adam)


@dataclass(frozen=True)
class Preconditioner:
    """P of one parameter. second_moment: v, of its shape. correction (): 1 - β2^t after t updates."""

    second_moment: Tensor
    correction: Tensor
    eps: float

    def shaped(self, shape: torch.Size) -> "Preconditioner":
        """Return it for the parameter in another shape: a kernel as a matrix."""
        return Preconditioner(self.second_moment.reshape(shape), self.correction, self.eps)

    def apply(self, direction: Tensor, part: Any = ..., memory: Tensor | None = None) -> Tensor:
        """direction (..., *shape of v[part]) becomes P∘direction, in place; part: an index into the
        parameter; memory: (numel of v[part],) to work in."""
        v = self.second_moment[part]
        denominator = torch.empty_like(v, dtype=direction.dtype) if memory is None else memory.view(v.shape)
        denominator.copy_(v).div_(self.correction).sqrt_().add_(self.eps)
        return direction.div_(denominator)


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is a v̂ yet: updates may have been left out so far. Waits for the device where the
    optimizer counts its steps there."""
    return any(state["step"] > 0 for state in optimizer.state.values())


def preconditioners(optimizer: torch.optim.Optimizer) -> dict[int, Preconditioner]:
    """By id of the parameter, of those that have been updated."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                correction = 1 - group["betas"][1] ** state["step"].double()
                found[id(parameter)] = Preconditioner(state["exp_avg_sq"], correction, group["eps"])
    return found


def check_adamw(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """AttachError unless the optimizer is an AdamW whose second moments are those of whole parameters."""
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
