"""Which layers of a model are covered, and by which rule."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .contraction import Split
from .errors import AttachError
from .layer_rules import CrossEntropyHead, LayerRule, find_rule
from .layer_rules.cross_entropy_head import head_strategy
from .layer_rules.registry import anything_goes
from .passes import CurrentPass
from .strategies import choose_strategy
from .tapped import RowMapMaker, TappedLayer, TappedParameters, own_parameters


def _alone(layer: Any, inputs: tuple[Any, ...], backprops: Tensor) -> Any:
    raise AssertionError("a parameter by itself is described where it is used")


BARE = LayerRule(_alone, (), anything_goes, parameter=True)


@dataclass(frozen=True)
class Covered:
    """The covered layers of a model, by name."""

    layers: dict[str, nn.Module]
    rules: dict[str, LayerRule]
    ties: dict[str, tuple[str, ...]]  # shared parameters: the first owner's name -> the names of all owners

    def tapped(self, current: CurrentPass, row_maps: Mapping[str, RowMapMaker]) -> list[TappedLayer]:
        """Return the covered layers with a tap each, not attached yet."""
        groups, owners = self.groups, self.owners
        found = []
        for name, layer in self.layers.items():
            rule = self.rules[name]
            kind = TappedParameters if rule.parameter else TappedLayer
            found.append(kind(layer, name, rule, groups[name], owners[name], current, row_maps.get(name)))
        return found

    @property
    def groups(self) -> dict[str, int]:
        """Return a number for each layer, the same for layers that share parameters (also through others)."""
        group = {name: number for number, name in enumerate(self.layers)}
        users: dict[str, set[str]] = {}
        for name, owners in self.owners.items():
            for first in owners.values():
                users.setdefault(first, set()).add(name)
        for sharing in (each for each in users.values() if len(each) > 1):
            merged = {group[name] for name in sharing}
            group = {name: min(merged) if number in merged else number for name, number in group.items()}
        return group

    @property
    def owners(self) -> dict[str, dict[str, str]]:
        """Return the name under which each parameter's direction is kept, that of its first owner."""
        first: dict[int, str] = {}
        found: dict[str, dict[str, str]] = {}
        for name, layer in self.layers.items():
            found[name] = {}
            for parameter, module, key in own_parameters(layer, self.rules[name]):
                found[name][parameter] = first.setdefault(id(module._parameters[key]), f"{name}.{parameter}")
        return found

    @property
    def owner_of(self) -> dict[int, str]:
        """Return the name under which the direction of each parameter is kept, by the parameter's id."""
        owners = self.owners
        return {
            id(module._parameters[key]): owners[name][parameter]
            for name, layer in self.layers.items()
            for parameter, module, key in own_parameters(layer, self.rules[name])
        }

    def check_unchanged(self, model: nn.Module) -> None:
        """Raise RuntimeError if an uncovered parameter trains, or if the tied weights have changed."""
        covered = {
            id(module._parameters[key])
            for name, layer in self.layers.items()
            for _, module, key in own_parameters(layer, self.rules[name])
        }
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in covered:
                raise RuntimeError(
                    f"'{name}' was unfrozen while the engine was attached: detach and attach again"
                )
        ties = find_ties(self.layers, self.rules)
        if ties != self.ties:
            raise RuntimeError(
                f"weights were tied, untied or frozen while the engine was attached "
                f"({', '.join(name for names in (ties or self.ties).values() for name in names)}): "
                "detach and attach again"
            )


def cover(model: nn.Module) -> Covered:
    """Find the layers with trainable parameters, and their rules.

    A module without a rule is covered parameter by parameter. The first step checks that each of its
    parameters meets the samples in an operation that can be divided by sample.

    Raises:
        AttachError: a layer whose rule does not cover its options, a module whose forward is overridden on
            the instance, weights that are shared in a way that is not covered, or no trainable parameter.
    """
    layers: dict[str, nn.Module] = {}
    rules: dict[str, LayerRule] = {}
    inside: list[str] = []  # names of layers whose rule covers their children, too
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        rule = find_rule(module)
        if rule is not None and rule.whole:
            trainable = [key for key, parameter in module.named_parameters() if parameter.requires_grad]
        else:
            trainable = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not trainable and not (rule is not None and rule.always):
            continue
        if rule is None:
            rule = BARE
        if rule.whole:
            inside.append(name)
        if rule is not BARE and not rule.whole and set(trainable) - set(rule.parameters):
            rule = BARE  # it is reparametrised (weight norm), or has parameters that the rule does not know
        if "forward" in vars(module):
            raise AttachError(
                f"the forward of module '{name}' is overridden on the instance: the rule would bypass it."
            )
        rule.check(module)
        layers[name], rules[name] = module, rule
    if not any(p.requires_grad for p in model.parameters()):
        raise AttachError("the model has no trainable parameter")
    return Covered(layers, rules, find_ties(layers, rules))


def contraction_plan(
    covered: Covered,
    split: Split,
    positions: int,
    strategy: str | None,
    by_direction: bool = False,
) -> dict[str, str]:
    """Return the strategy of each weight for rows of this many positions.

    Args:
        strategy: the one that all must use; None: chosen by shape.
        by_direction: True with several micro-batches, a preconditioner, or a direction that is given.
    """
    plan = {}
    for name, layer in covered.layers.items():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        head = isinstance(layer, CrossEntropyHead)
        if head or covered.rules[name].product:
            choose = head_strategy if head else choose_strategy
            p, d = weight.shape
            plan[name] = strategy or choose(split, positions, p, d, by_direction)
    return plan


def find_ties(layers: dict[str, nn.Module], rules: dict[str, LayerRule]) -> dict[str, tuple[str, ...]]:
    """Return the shared trainable parameters: the first owner's name -> the names of all owners.

    Raises:
        AttachError: an embedding's weight that is shared with a layer which is neither an embedding nor an
            output layer, or a fused head's weight that is shared with another output layer.
    """
    owners: dict[nn.Parameter, list[tuple[str, LayerRule]]] = {}
    for name, layer in layers.items():
        for key, module, own in own_parameters(layer, rules[name]):
            parameter = module._parameters[own]
            if parameter is not None and parameter.requires_grad:
                owners.setdefault(parameter, []).append((f"{name}.{key}", rules[name]))
    ties = {}
    for shared in owners.values():
        if len(shared) == 1:
            continue
        names = tuple(name for name, _ in shared)
        kinds = [rule for _, rule in shared]
        others = [rule for rule in kinds if not rule.lookup]
        heads = [rule for rule in others if rule.run is not None]
        if (len(others) < len(kinds) and not all(rule.product for rule in others)) or (
            heads and len(others) > 1
        ):
            raise AttachError(
                f"{' and '.join(names)} are one parameter: a weight may be shared by embeddings and output "
                "layers (nn.Linear, or one CrossEntropyHead), or by layers of one kind. Untie the others."
            )
        ties[names[0]] = names
    return ties
