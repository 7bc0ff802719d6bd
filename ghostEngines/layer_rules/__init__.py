"""How the layers of each kind are described: one file each, which registers its rules when it is imported here."""

from . import embedding, layer_norm, linear
from .cross_entropy_head import CrossEntropyHead
from .registry import RULES, LayerRule, find_rule, register_rule
