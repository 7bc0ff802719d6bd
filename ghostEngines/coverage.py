"""What the engine can score, and errors that say why it can't: the checks made when it attaches."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from transformers.pytorch_utils import Conv1D

from .contraction import Split, Strategy, choose_strategy
from .errors import AttachError
from .layer_rules import RULES, CrossEntropyHead
from .layer_rules.cross_entropy_head import head_strategy


def covered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with trainable parameters, by name. Raises AttachError for one that no rule covers."""
    layers = {}
    for name, module in model.named_modules():
        trainable = [
            key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad
        ]
        if not trainable and not (type(module) in RULES and RULES[type(module)].always):
            continue
        if type(module) not in RULES:
            raise AttachError(
                f"no rule covers module '{name}' of type {type(module).__name__}, whose parameters "
                f"{', '.join(trainable)} train: there are rules for "
                f"{', '.join(sorted(kind.__name__ for kind in RULES))}. Freeze the parameters "
                "(requires_grad_(False)), or write a rule and register it with "
                f"@ghostEngines.register_rule({type(module).__name__})."
            )
        rule = RULES[type(module)]
        unknown = sorted(set(trainable) - set(rule.parameters))
        if unknown:
            raise AttachError(
                f"module '{name}' of type {type(module).__name__} has trainable parameters that its rule "
                f"does not know: {', '.join(unknown)}. Is the layer reparametrised (weight norm, LoRA)? "
                "Give it a type and a rule of its own."
            )
        if "forward" in vars(module):
            raise AttachError(
                f"the forward of module '{name}' is overridden on the instance: the rule would bypass it."
            )
        rule.check(module)
        layers[name] = module
    if not any(p.requires_grad for layer in layers.values() for p in layer.parameters(recurse=False)):
        raise AttachError("the model has no trainable parameter")
    return layers


def contraction_plan(
    layers: dict[str, nn.Module],
    split: Split,
    positions: int,
    strategy: Strategy | None,
    by_direction: bool = False,
) -> dict[str, Strategy]:
    """Which strategy each weight of `covered_layers` uses for rows of this many positions; `strategy`: the
    one that is forced on all, or None; by_direction: with several micro-batches, or direction "adamw"."""
    plan = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear | Conv1D | CrossEntropyHead):
            choose = head_strategy if isinstance(layer, CrossEntropyHead) else choose_strategy
            p, d = layer.weight.shape
            plan[name] = strategy or choose(split, positions, p, d, by_direction)
    return plan


def find_ties(layers: dict[str, nn.Module]) -> dict[str, str]:
    """Layer name -> name of the tie its weight belongs to, for weights shared by an embedding and an output
    layer.

    Raises AttachError for parameters that are shared in any other way.
    """
    owners: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for name, layer in layers.items():
        for key, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            owners.setdefault(parameter, []).append((name, key))
    ties = {}
    for shared in owners.values():
        if len(shared) == 1:
            continue
        names = [name for name, _ in shared]
        kinds = [type(layers[name]) for name in names]
        if (
            len(shared) != 2
            or kinds.count(nn.Embedding) != 1
            or not {nn.Linear, CrossEntropyHead} & set(kinds)
        ):
            raise AttachError(
                f"{' and '.join('.'.join(owner) for owner in shared)} are one parameter: only a weight "
                "shared by one nn.Embedding and one output layer (nn.Linear or CrossEntropyHead) is "
                "covered. Untie the others."
            )
        ties.update(dict.fromkeys(names, names[0]))
    return ties


def mixing_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules, by name, that may make a row's loss depend on the other rows: dropout and batch
    normalisation."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def check_rows_are_independent(modules: list[tuple[str, nn.Module]]) -> None:
    """AttachError if one of `mixing_modules` is at work: with dropout n+m rows draw other masks than n rows
    would."""
    for name, module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise AttachError(
                    f"module '{name}' of type {type(module).__name__} normalises over the batch: a row's "
                    "loss then depends on the other rows and has no gradient of its own. Use LayerNorm, or "
                    "put the module into eval mode."
                )
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise AttachError(
                f"module '{name}' drops out with p={module.p}: the scores would be of a random model, and "
                "the training not the one without validation rows. Set its p to 0."
            )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """AttachError unless the optimizer updates exactly the model's trainable parameters: those are what a
    score speaks of."""
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


ACCUMULATE = "torch::autograd::AccumulateGrad"  # the node at which a gradient arrives at a parameter


def find_bypass(
    loss: Tensor, probes: Sequence[Tensor], layers: Sequence[tuple[str, nn.Module]]
) -> str | None:
    """The name of a layer whose parameter gets a gradient from anything but one call of the layer; None if
    there is none.

    Read off the graph of the loss: a rule's node sends a gradient to a probe as well as to the parameters,
    so a node that sends one to a parameter and none to the probe is not a rule's, and each parameter may get
    one for each layer that owns it. (Of a compiled block the graph shows one node only.)
    """
    names: dict[int, list[str]] = {}
    for name, layer in layers:
        for parameter in layer.parameters(recurse=False):
            names.setdefault(id(parameter), []).append(name)
    uses: Counter[int] = Counter()
    probe_ids = {id(probe) for probe in probes}
    for node in graph_nodes(loss):
        children: list[Any] = [child for child, _ in node.next_functions if child is not None]
        leaves = [id(child.variable) for child in children if child.name() == ACCUMULATE]
        for leaf in leaves:
            if leaf in names:
                uses[leaf] += 1
                if probe_ids.isdisjoint(leaves) or uses[leaf] > len(names[leaf]):
                    return names[leaf][0]
    return None


def graph_nodes(loss: Tensor) -> Iterator[Node]:
    """Every node of the graph behind the loss, once."""
    assert loss.grad_fn is not None
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
