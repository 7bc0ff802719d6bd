"""Update rules: how an optimizer makes a step of a gradient, entry by entry.

An update is θ - lr·(u(g) + d), with g the gradient that the optimizer is given, u the rule and d the decay. A
sample's share of u(g) is linear in the sample's own gradient: that is what a value is made of (exact_values.py).

For AdamW (Loshchilov & Hutter, arXiv 1711.05101; Kingma & Ba, arXiv 1412.6980, Algorithm 1), with t the number of
the update, from 1:

    a = (1-β1) / (1-β1^t)            m0 = β1·m / (1-β1^t)
    b = (1-β2) / (1-β2^t)            s0 = sqrt(β2·v / (1-β2^t))        s = sqrt(s0² + b·g²)
    u(g) = (m0 + a·g) / (s + ε)

An optimizer of one's own needs an `UpdateRule`, about 20 lines, and `register_update_rule`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import AttachError
from .preconditioner import Preconditioner, SecondMoment, Uniform

Group = Mapping[str, Any]
"""One of an optimizer's `param_groups`: its learning rate, betas, and so on."""


class Update(ABC):
    """What some entries of a parameter are moved by, over -lr. Each tensor is computed when it is asked for."""

    @abstractmethod
    def step(self) -> Tensor:
        """Return u(g)."""

    @abstractmethod
    def idle(self) -> Tensor:
        """Return u(0): what earlier gradients move them by."""

    @abstractmethod
    def decay(self) -> Tensor:
        """Return d."""

    @abstractmethod
    def share(self) -> Tensor:
        """Return A = (u(g) - u(0)) / g in new memory: A∘g is what this gradient moves them by."""

    @abstractmethod
    def slope(self) -> Tensor:
        """Return J = u'(g) in new memory."""


class UpdateRule(ABC):
    """How one class of optimizers updates parameters."""

    @abstractmethod
    def check(self, group: Group) -> None:
        """Raise AttachError for options that the rule does not cover."""

    @abstractmethod
    def preconditioner(self, group: Group, state: Mapping[str, Any]) -> Preconditioner | None:
        """Return what is known of A before the gradient is: P, without the learning rate.

        Args:
            state: the optimizer's state of the parameter before the update; empty before the first one.

        Returns:
            None if nothing is known yet.
        """

    @abstractmethod
    def update(self, group: Group, state: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> Update:
        """Return what the coming update is made of. Changes nothing.

        Args:
            state, parameter, gradient: of some entries of a parameter, flat.
        """


class AdamRule(UpdateRule):
    """AdamW, and Adam without decay."""

    def check(self, group: Group) -> None:
        if group["amsgrad"]:
            raise AttachError('amsgrad=True is not covered: leave it out, or use direction "gradient"')
        _check_maximize(group)
        if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
            raise AttachError(
                "Adam with weight_decay adds it to the gradient, so that it is in both moments, which is not covered: "
                'use torch.optim.AdamW, or direction "gradient"'
            )

    def preconditioner(self, group: Group, state: Mapping[str, Any]) -> Preconditioner | None:
        if not state:
            return None
        (beta1, beta2), steps = group["betas"], state["step"].double()
        factor = (1 - beta1) / (1 - beta1 ** (steps + 1))
        return SecondMoment(state["exp_avg_sq"], 1 - beta2**steps, group["eps"], factor)

    def update(self, group: Group, state: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> Update:
        return _AdamUpdate(group, state, parameter, gradient)


class _AdamUpdate(Update):
    def __init__(self, group: Group, state: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        (beta1, beta2), g = group["betas"], gradient
        if state:
            m, v, t = state["exp_avg"], state["exp_avg_sq"], float(state["step"]) + 1
        else:  # before the first update
            m, v, t = torch.zeros_like(g), torch.zeros_like(g), 1.0
        first, second = 1 - beta1**t, 1 - beta2**t
        self._a, self._b = (1 - beta1) / first, (1 - beta2) / second
        self._m0: Tensor = m * (beta1 / first)
        self._v0: Tensor = v * (beta2 / second)
        self._eps, self._decay = float(group["eps"]), float(group["weight_decay"])
        self._g, self._parameter = g, parameter

    @cached_property
    def _s0(self) -> Tensor:
        return self._v0.sqrt()

    @cached_property
    def _s(self) -> Tensor:
        return self._v0.addcmul(self._g, self._g, value=self._b).sqrt_()

    @cached_property
    def _u(self) -> Tensor:
        return self._m0.add(self._g, alpha=self._a).div_(self._s + self._eps)

    def step(self) -> Tensor:
        return self._u

    def idle(self) -> Tensor:
        return self._m0 / (self._s0 + self._eps)

    def decay(self) -> Tensor:
        return self._decay * self._parameter

    # Where s is 0, at an entry that never had a gradient, so are g and m0.
    def share(self) -> Tensor:
        divisor = (self._s + self._s0).mul_(self._s0 + self._eps).masked_fill_(self._s == 0, 1)
        return self._over_s((self._m0 * self._g).div_(divisor))

    def slope(self) -> Tensor:
        return self._over_s((self._u * self._g).div_(self._s.masked_fill(self._s == 0, 1)))

    def _over_s(self, rest: Tensor) -> Tensor:
        """Return (a - b·rest) / (s + ε)."""
        return rest.mul_(-self._b).add_(self._a).div_(self._s + self._eps)


class SGDRule(UpdateRule):
    """SGD, with or without momentum; its decay is a part of the gradient."""

    def check(self, group: Group) -> None:
        _check_maximize(group)

    def preconditioner(self, group: Group, state: Mapping[str, Any]) -> Preconditioner:
        return Uniform(_sgd_factor(group, state))

    def update(self, group: Group, state: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> Update:
        factor, idle = _sgd_factor(group, state), torch.zeros_like(gradient)
        if group["momentum"] and _buffer(state) is not None:
            momentum = group["momentum"]
            idle = _buffer(state) * (momentum**2 if group["nesterov"] else momentum)
        return _LinearUpdate(idle, factor, gradient, group["weight_decay"] * factor * parameter)


@dataclass(frozen=True)
class _LinearUpdate(Update):
    """u(g) = u(0) + factor·g"""

    idle_step: Tensor
    factor: float
    gradient: Tensor
    of_decay: Tensor

    def step(self) -> Tensor:
        return self.idle_step.add(self.gradient, alpha=self.factor)

    def idle(self) -> Tensor:
        return self.idle_step

    def decay(self) -> Tensor:
        return self.of_decay

    def share(self) -> Tensor:
        return torch.full_like(self.gradient, self.factor)

    slope = share


def _sgd_factor(group: Group, state: Mapping[str, Any]) -> float:
    """Return what SGD multiplies a gradient with in this update."""
    momentum = group["momentum"]
    into_buffer = 1.0 if _buffer(state) is None else 1.0 - group["dampening"]
    if not momentum:
        return 1.0
    return 1 + momentum * into_buffer if group["nesterov"] else into_buffer


def _buffer(state: Mapping[str, Any]) -> Any:
    return state.get("momentum_buffer")


def _check_maximize(group: Group) -> None:
    if group["maximize"]:
        raise AttachError(
            'maximize=True is not covered: minimise the negative loss, or use direction "gradient"'
        )


UPDATE_RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.AdamW: AdamRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.SGD: SGDRule(),
}
"""By the exact class: a subclass may update in another way."""


def register_update_rule(optimizer_class: type[torch.optim.Optimizer], rule: UpdateRule) -> None:
    """Cover optimizers of exactly this class with a rule.

    Raises:
        ValueError: the class has a rule already.
    """
    if optimizer_class in UPDATE_RULES:
        raise ValueError(f"{optimizer_class.__name__} has an update rule already")
    UPDATE_RULES[optimizer_class] = rule
