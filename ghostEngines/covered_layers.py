"""What the engine can score, and errors that say why it can't: the checks made when it attaches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contraction import Split
from .errors import AttachError
from .layer_rules import CrossEntropyHead, LayerRule, find_rule
from .layer_rules.cross_entropy_head import head_strategy
from .layer_rules.registry import anything_goes
from .strategies import choose_strategy
from .tapped import own_parameters


def _alone(layer: Any, inputs: tuple[Any, ...], backprops: Tensor) -> Any:
    raise AssertionError("a parameter by itself is described where it is used")


BARE = LayerRule(_alone, (), anything_goes, parameter=True)


@dataclass(frozen=True)
class Covered:
    """The covered layers of a model, by name."""

    layers: dict[str, nn.Module]
    rules: dict[str, LayerRule]
    ties: dict[
        str, tuple[str, ...]
    ]  # parameters that several layers share: the first owner's name -> all owners'

    def rule(self, name: str) -> LayerRule:
        return self.rules[name]

    @property
    def groups(self) -> dict[str, int]:
        """A number for each layer, the same for layers that share a parameter, also by way of others."""
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
        """Of each layer's parameters the name under which the direction is kept: that of the first owner."""
        first: dict[int, str] = {}
        found: dict[str, dict[str, str]] = {}
        for name, layer in self.layers.items():
            found[name] = {}
            for parameter, module, key in own_parameters(layer, self.rules[name]):
                found[name][parameter] = first.setdefault(id(module._parameters[key]), f"{name}.{parameter}")
        return found

    def check_unchanged(self, model: nn.Module) -> None:
        """Raise RuntimeError if a parameter trains that is not covered, or other weights are tied than were."""
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

    Parameters of other modules are covered by themselves, if they meet the samples in an operation that can
    be taken apart, which the first step shows.

    Raises AttachError for a layer whose rule does not cover its options."""
    layers: dict[str, nn.Module] = {}
    rules: dict[str, LayerRule] = {}
    inside: list[str] = []  # names of layers whose children are their own
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
            rule = BARE  # reparametrised (weight norm), or with more parameters than the layer's own
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
    """Return which strategy each weight of the layers uses for rows of this many positions. `strategy`: the
    one that is forced on all, or None; by_direction: with several micro-batches, or direction "adamw"."""
    plan = {}
    for name, layer in covered.layers.items():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        head = isinstance(layer, CrossEntropyHead)
        if head or covered.rule(name).product:
            choose = head_strategy if head else choose_strategy
            p, d = weight.shape
            plan[name] = strategy or choose(split, positions, p, d, by_direction)
    return plan


def find_ties(layers: dict[str, nn.Module], rules: dict[str, LayerRule]) -> dict[str, tuple[str, ...]]:
    """Return the trainable parameters that several layers share: the first owner's name -> all owners' names.

    Raises AttachError for a weight that is looked up in one layer, and neither looked up nor multiplied with
    in another.
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


def mixing_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules, by name, that may make a row's loss depend on the other rows: dropout and batch
    normalisation."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def check_rows_are_independent(modules: list[tuple[str, nn.Module]]) -> None:
    """Raise AttachError if one of `mixing_modules` is at work: with dropout n+m rows draw other masks than n
    rows would."""
    for name, module in modules:
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise AttachError(
                f"module '{name}' of type {type(module).__name__} normalises over the batch: a row's "
                "loss then depends on the other rows and has no gradient of its own. Use LayerNorm, or "
                "put the module into eval mode."
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise AttachError(
                f"module '{name}' drops out with p={module.p}: the scores would be of a random model, and "
                "the training not the one without validation rows. Set its p to 0, or put it into eval mode."
            )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise AttachError unless the optimizer updates exactly the model's trainable parameters: those are what
    a score speaks of."""
    trained = {
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    named = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    left_out = [name for key, name in named.items() if key not in trained]
    if left_out:
        raise AttachError(
            f"the optimizer does not update {', '.join(left_out)}, which would be counted in the scores all "
            "the same: freeze them (requires_grad_(False)) or give them to the optimizer."
        )
    foreign = len(trained - set(named))
    if foreign:
        raise AttachError(f"the optimizer updates {foreign} trainable parameters that are not in the model.")
