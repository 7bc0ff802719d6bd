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

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AttachError
from .preconditioner import Preconditioner, SecondMoment, Uniform

Group = Mapping[str, Any]
"""One of an optimizer's `param_groups`: its learning rate, betas, and so on."""


@dataclass(frozen=True)
class Update:
    """What some entries of a parameter are moved by, over -lr. All of one shape."""

    step: Tensor  # u(g)
    idle: Tensor  # u(0): what earlier gradients move them by
    decay: Tensor  # d
    share: Callable[[], Tensor]  # A = (u(g) - u(0)) / g, so that A∘g is what this gradient moves them by
    slope: Callable[[], Tensor]  # J = u'(g)


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
        (beta1, beta2), eps, g = group["betas"], group["eps"], gradient
        if state:
            m, v, t = state["exp_avg"], state["exp_avg_sq"], float(state["step"]) + 1
        else:  # before the first update
            m, v, t = torch.zeros_like(g), torch.zeros_like(g), 1.0
        first, second = 1 - beta1**t, 1 - beta2**t
        a, b = (1 - beta1) / first, (1 - beta2) / second
        m0, v0 = m * (beta1 / first), v * (beta2 / second)
        s0, s = v0.sqrt(), v0.addcmul(g, g, value=b).sqrt_()
        u, idle = m0.add(g, alpha=a).div_(s + eps), m0 / (s0 + eps)

        # Where s is 0, at an entry that never had a gradient, so are g and m0.
        def share() -> Tensor:
            rest: Tensor = (m0 * g).mul_(b).div_(((s + s0) * (s0 + eps)).masked_fill_(s == 0, 1))
            return rest.neg_().add_(a).div_(s + eps)

        def slope() -> Tensor:
            rest: Tensor = (u * g).mul_(b).div_(s.masked_fill(s == 0, 1))
            return rest.neg_().add_(a).div_(s + eps)

        return Update(u, idle, group["weight_decay"] * parameter, share, slope)


class SGDRule(UpdateRule):
    """SGD, with or without momentum; its decay is a part of the gradient."""

    def check(self, group: Group) -> None:
        _check_maximize(group)

    def preconditioner(self, group: Group, state: Mapping[str, Any]) -> Preconditioner:
        return Uniform(self._factor(group, state))

    def update(self, group: Group, state: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> Update:
        factor, momentum = self._factor(group, state), group["momentum"]
        idle = torch.zeros_like(gradient)
        if momentum and _buffer(state) is not None:
            idle = _buffer(state) * (momentum**2 if group["nesterov"] else momentum)
        decay = group["weight_decay"] * factor * parameter

        def share() -> Tensor:
            return torch.full_like(gradient, factor)

        return Update(idle + factor * gradient, idle, decay, share, share)

    def _factor(self, group: Group, state: Mapping[str, Any]) -> float:
        """Return what a gradient of this update is multiplied with in it."""
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


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside Hugging Face accelerate's wrapper; any other one as it is."""
    accelerate = sys.modules.get("accelerate.optimizer")
    if accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        inner: torch.optim.Optimizer = optimizer.optimizer
        return inner
    return optimizer


@dataclass(frozen=True)
class Member:
    """One parameter of an optimizer, with its group and its state before the coming update."""

    parameter: Tensor
    group: Group
    state: Mapping[str, Any]


class Updates:
    """The updates that an optimizer makes.

    Raises:
        AttachError: there is no rule for its class, or its rule does not cover its options.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = unwrapped(optimizer)
        kind = type(self._optimizer)
        if kind not in UPDATE_RULES:
            raise AttachError(
                f"there is no update rule for the optimizer {kind.__name__}, so that it is unknown what a gradient "
                f"does in its step. There are rules for {', '.join(each.__name__ for each in UPDATE_RULES)}; "
                'register one (register_update_rule), or use direction "gradient"'
            )
        self.rule = UPDATE_RULES[kind]
        for group in self._optimizer.param_groups:
            self.rule.check(group)
        self._has_stepped = False

    @property
    def lr(self) -> float:
        """Return the largest learning rate of all groups. The others' are relative to it."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def members(self) -> Iterator[Member]:
        """Yield the parameters that train."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield Member(parameter, group, self._optimizer.state.get(parameter, {}))

    def preconditioners(self) -> dict[int, Preconditioner] | None:
        """Return P, with the learning rate over `lr`, by id of the parameter.

        Returns:
            None before the first update of an optimizer whose P is not known before it. Empty if P is 1 for all.
        """
        largest, found = self.lr, {}
        for member in self.members():
            preconditioner = self.rule.preconditioner(member.group, member.state)
            if preconditioner is not None:
                relative = 1.0 if largest == 0 else float(member.group["lr"]) / largest
                found[id(member.parameter)] = (
                    preconditioner if relative == 1 else preconditioner.times(relative)
                )
        if not found or not self._known():
            return None
        if all(isinstance(each, Uniform) and each.factor == 1 for each in found.values()):
            return {}
        return found

    def _known(self) -> bool:
        """Return whether updates have been made, for an optimizer that counts them.

        It may have skipped every step so far. Waits, until there was one, for a device that counts.
        """
        counts = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        self._has_stepped = self._has_stepped or not counts or any(count > 0 for count in counts)
        return self._has_stepped
