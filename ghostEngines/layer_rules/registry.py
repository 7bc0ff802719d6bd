"""What a layer rule is, and the registry of rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..descriptions import Description

Describe = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Description]]
"""describe(layer, inputs, backprops) -> {parameter: description}.

Args:
    inputs: of the layer's forward, named ones last.
    backprops: the gradient of its output.

The first dimension is the sample, or what the layer's row map maps to samples. The function is pure: it
changes neither its arguments nor the layer, and reads only the layer's options.
"""

RuleCheck = Callable[[Any], None]
Run = Callable[..., Any]


@dataclass(frozen=True)
class LayerRule:
    """How layers of one kind are described."""

    describe: Describe
    parameters: tuple[str, ...]  # that the rule knows; with other ones each parameter is covered by itself
    check: RuleCheck  # raises AttachError for options of a layer that the rule does not cover
    product: bool = False  # a matrix product, whose first input is cast to autocast's dtype once
    wide: bool = False  # floating-point tensors are passed to the rule in the accumulation dtype
    lookup: bool = False  # the first input has tokens, whose rows of the parameter `weight` are looked up
    again: bool = False  # the next layer can recompute the output from the first input
    whole: bool = False  # the rule covers the parameters of the layer's children, too
    parameter: bool = False  # for a single parameter, wherever it is used (tapped.TappedParameters)
    unit: bool = False  # the module is rerun, one sample at a time (units.py)
    run: Run | None = None  # run(layer, tapped, *inputs), called instead of the tap (the fused head)
    # expected(layer, inputs) -> the output that the rule assumes; the first step compares it with the layer's
    # output.
    expected: Callable[[Any, tuple[Any, ...]], Tensor] | None = None
    always: bool = False  # used for layers without trainable parameters, too


RULES: dict[type[nn.Module] | str, LayerRule] = {}
"""The rules by exact type, or by the full name of a type whose library need not be installed."""


def anything_goes(layer: nn.Module) -> None:
    """Accept every layer: most have no option that a rule could fail to cover."""


def register_rule(
    *layer_types: type[nn.Module] | str,
    parameters: tuple[str, ...] = ("weight", "bias"),
    check: RuleCheck = anything_goes,
    **flags: Any,
) -> Callable[[Describe], Describe]:
    """Return a decorator that registers a function as the rule of these layer types.

    A rule is for exact types, not for subclasses. A subclass may use its weight in another way than its
    parent: the `out_proj` of `nn.MultiheadAttention` is a subclass of `nn.Linear` and is never called.

    Args:
        layer_types: types, or full names of types.
        parameters: that the rule knows.
        check: raises AttachError for a layer whose options the rule does not cover.
        flags: the other fields of `LayerRule`.

    Raises:
        ValueError: a type that has a rule already.
    """

    def register(describe: Describe) -> Describe:
        for layer_type in layer_types:
            if layer_type in RULES:
                name = layer_type if isinstance(layer_type, str) else layer_type.__name__
                raise ValueError(f"{name} has a rule already: {RULES[layer_type].describe.__qualname__}")
            RULES[layer_type] = LayerRule(describe, parameters, check, **flags)
        return describe

    return register
