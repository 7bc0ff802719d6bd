"""Which layers are covered, and how a layer of each type runs while the engine is attached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

RuleForward = Callable[..., Any]
"""forward(layer, step, *inputs) -> output. The output is that of the layer's own forward; in the backward
pass the gradients of the layer's parameters are those of the train rows alone, and `layer_step.probe`
receives this layer's dot products, (n, k)."""

RuleCheck = Callable[[Any], None]


@dataclass(frozen=True)
class LayerRule:
    """forward: see `RuleForward`. check: raises AttachError for options that the rule does not cover.
    parameters: the names of the parameters that the rule knows; a layer with another one is not covered.
    always: whether the rule runs for a layer without trainable parameters, too."""

    forward: RuleForward
    check: RuleCheck
    parameters: tuple[str, ...]
    always: bool


RULES: dict[type[nn.Module], LayerRule] = {}


def _anything_goes(layer: nn.Module) -> None:
    """Most layers have no option that a rule could fail to cover."""


def register_rule(
    *layer_types: type[nn.Module],
    check: RuleCheck = _anything_goes,
    parameters: tuple[str, ...] = ("weight", "bias"),
    always: bool = False,
) -> Callable[[RuleForward], RuleForward]:
    """Decorator: this function is how layers of exactly these types run under the engine.

    Exact types, not subclasses: a subclass may use its weight in a way its parent does not (the `out_proj` of
    `nn.MultiheadAttention` is a subclass of `nn.Linear` and is never called). Raises ValueError for a type
    that has a rule."""

    def register(forward: RuleForward) -> RuleForward:
        for layer_type in layer_types:
            if layer_type in RULES:
                raise ValueError(
                    f"{layer_type.__name__} has a rule already: {RULES[layer_type].forward.__qualname__}"
                )
            RULES[layer_type] = LayerRule(forward, check, parameters, always)
        return forward

    return register
