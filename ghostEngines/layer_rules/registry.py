"""Which layers are covered, and how a rule says what a layer's per-sample gradients are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..descriptions import Description

Describe = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Description]]
"""describe(layer, inputs, backprops) -> {parameter: description}.

inputs: as the layer's forward got them, named ones last; backprops: the gradient of its output. Pure: it
changes neither its arguments nor the layer, and reads the layer's options only. The first dimension is the
sample, or whatever the layer's row map maps to samples.
"""

RuleCheck = Callable[[Any], None]
Run = Callable[..., Any]


@dataclass(frozen=True)
class LayerRule:
    """How layers of one kind are described."""

    describe: Describe
    parameters: tuple[str, ...]  # those that the rule knows; a layer with another one is not covered
    check: RuleCheck  # raises AttachError for options of a layer that the rule does not cover
    product: bool = (
        False  # a matrix product: the first input is cast to autocast's dtype before the layer, once
    )
    wide: bool = False  # the rule wants floating-point tensors in the accumulation dtype
    lookup: bool = False  # the first input are tokens, and the parameter `weight` is looked up
    again: bool = False  # the output can be recomputed from the first input, by the layer that takes it
    whole: bool = False  # the parameters of the layer's children are its own
    parameter: bool = (
        False  # no layer: one parameter by itself, wherever it is used (tapped.TappedParameters)
    )
    unit: bool = False  # the module is run again, one sample at a time (units.py)
    run: Run | None = None  # run(layer, tapped, *inputs) in the place of the tap (the fused head)
    # expected(layer, inputs) -> the output that the rule takes for granted; compared with the output at the
    # first step
    expected: Callable[[Any, tuple[Any, ...]], Tensor] | None = None
    always: bool = False  # it is there for a layer without trainable parameters, too


RULES: dict[type[nn.Module] | str, LayerRule] = {}
"""By exact type, or by the full name of a type whose library need not be installed."""


def anything_goes(layer: nn.Module) -> None:
    """Most layers have no option that a rule could fail to cover."""


def register_rule(
    *layer_types: type[nn.Module] | str,
    parameters: tuple[str, ...] = ("weight", "bias"),
    check: RuleCheck = anything_goes,
    **flags: Any,
) -> Callable[[Describe], Describe]:
    """Return a decorator: the function describes layers of exactly these types, or types of these full names.

    Exact types, not subclasses: a subclass may use its weight in a way its parent does not (the `out_proj` of
    `nn.MultiheadAttention` is a subclass of `nn.Linear` and is never called). flags: those of `LayerRule`.
    Raises ValueError for a type that has a rule.
    """

    def register(describe: Describe) -> Describe:
        for layer_type in layer_types:
            if layer_type in RULES:
                name = layer_type if isinstance(layer_type, str) else layer_type.__name__
                raise ValueError(f"{name} has a rule already: {RULES[layer_type].describe.__qualname__}")
            RULES[layer_type] = LayerRule(describe, parameters, check, **flags)
        return describe

    return register
