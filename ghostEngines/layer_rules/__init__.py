"""One file for each family of layers; importing a file registers its rules."""

from . import cross_entropy_head, embedding, layer_norm, linear
from .cross_entropy_head import CrossEntropyHead
from .registry import RULES, LayerRule, register_rule

__all__ = ["RULES", "CrossEntropyHead", "LayerRule", "register_rule"]
