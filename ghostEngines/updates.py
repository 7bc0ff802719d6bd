"""The coming update of an optimizer: which parameters it moves, by which rule, and from which state."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AttachError
from .preconditioner import Preconditioner, Uniform
from .update_rules import UPDATE_RULES, Group


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
        self._has_stepped = False
        self.check()

    def check(self) -> None:
        """Raise AttachError for options that the rule does not cover; they may be set between two steps."""
        for group in self._optimizer.param_groups:
            self.rule.check(group)

    @property
    def lr(self) -> float:
        """Return the largest learning rate of all groups. The others' are relative to it."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def members(self) -> Iterator[Member]:
        """Yield the parameters that train."""
        self.check()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield Member(parameter, group, self._optimizer.state.get(parameter, {}))

    def moved(self) -> Iterator[Member]:
        """Yield the parameters that the coming update moves: those with a gradient.

        Raises:
            RuntimeError: none has one, or a parameter has one that does not train any more.
        """
        every = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if any(parameter.grad is not None and not parameter.requires_grad for parameter in every):
            raise RuntimeError(
                "a frozen parameter of the optimizer still has a gradient (.grad), by which the optimizer moves it: "
                "set its .grad to None when you freeze it"
            )
        if all(parameter.grad is None for parameter in every):
            raise RuntimeError("no parameter has a gradient (.grad), so that there is no update to come")
        return (member for member in self.members() if member.parameter.grad is not None)

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
