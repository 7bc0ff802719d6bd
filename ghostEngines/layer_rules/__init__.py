"""The rules of all layer families: one file each, whose rules are registered when it is imported here."""

from torch import nn

from . import conv, embedding, layer_norm, linear
from .cross_entropy_head import CrossEntropyHead
from .norms import norm_rule
from .registry import RULES, LayerRule, register_rule
from .subclasses import subclass_rule
from .units import UNITS, register_unit, stacked_rule

__all__ = [
    "RULES",
    "CrossEntropyHead",
    "LayerRule",
    "find_rule",
    "register_rule",
    "register_unit",
]


def find_rule(layer: nn.Module) -> LayerRule | None:
    """Return the rule of a layer, by its type or by what it computes; None if there is none."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    found = UNITS.get(kind) or RULES.get(kind) or RULES.get(name) or norm_rule(layer) or subclass_rule(layer)
    return found or stacked_rule(layer)
