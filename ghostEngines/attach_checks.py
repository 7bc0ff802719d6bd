"""Checks when the engine attaches: the rows do not mix, the options fit the model, the optimizer updates it."""

from collections.abc import Mapping

import torch
from torch import nn

from .covered_layers import Covered
from .errors import AttachError
from .options import EngineOptions
from .preconditioner import Preconditioner
from .strategies import STRATEGIES
from .tapped import RowMapMaker
from .updates import Updates


def mixing_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules that make a row's loss depend on other rows, or on random numbers.

    These are dropout and batch normalisation.
    """
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def check_rows_are_independent(modules: list[tuple[str, nn.Module]]) -> None:
    """Raise AttachError if one of `mixing_modules` is active.

    With dropout n+m rows would draw other masks than n rows.
    """
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


def check_ties_by_layer(options: EngineOptions, covered: Covered) -> None:
    """Raise AttachError if tied weights need per-layer scores of several micro-batches."""
    if options.granularity == "per_layer" and covered.ties:
        raise AttachError(
            f"per-layer scores of several micro-batches with tied weights ({', '.join(covered.ties)}): the "
            "validation gradient that is kept is the sum of both ends, so that their parts cannot be "
            "told apart. Untie them, or use another granularity."
        )


def check_units_by_position(covered: Covered) -> None:
    """Raise AttachError if scores by position are asked for of a module that is run again for each row."""
    units = [
        f"'{name}' ({type(covered.layers[name]).__name__})"
        for name, rule in covered.rules.items()
        if rule.unit
    ]
    if units:
        raise AttachError(
            f"granularity 'token' with {', '.join(units)}: such a module is taken as one layer and run again for each "
            "row, so that its gradient is known by row only; freeze its parameters, or use another granularity"
        )


def check_row_maps(covered: Covered, row_maps: Mapping[str, RowMapMaker]) -> None:
    """Raise AttachError for a row map of a layer that is not covered."""
    unknown = sorted(row_maps.keys() - covered.layers.keys())
    if unknown:
        raise AttachError(f"row_maps: {', '.join(unknown)} is no covered layer of the model")


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise AttachError unless the optimizer updates exactly the parameters that are scored."""
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


def updates_of(options: EngineOptions, optimizer: torch.optim.Optimizer | None) -> Updates | None:
    """Return the optimizer's updates for direction "auto"; None for "gradient", which needs none.

    Raises:
        AttachError: there is no optimizer, no rule covers it, or `check_preconditioners`.
    """
    if options.direction == "gradient":
        return None
    if optimizer is None:
        raise AttachError('direction "auto" is that of the optimizer: attach the engine with the optimizer')
    updates = Updates(optimizer)
    check_preconditioners(options, updates.preconditioners())
    return updates


def check_preconditioners(options: EngineOptions, found: Mapping[int, Preconditioner] | None) -> None:
    """Raise AttachError if P, of `Updates.preconditioners`, is not 1 and strategy "gram" makes no direction for it.

    P may be 1 in some steps only, as that of SGD with dampening.
    """
    if found != {} and not _by_direction(options):
        raise AttachError(
            f'strategy "{options.strategy}" makes no direction that a preconditioner could be applied to: choose '
            'another one, or direction "gradient"'
        )


def _by_direction(options: EngineOptions) -> bool:
    return options.strategy is None or STRATEGIES[options.strategy].by_direction


def check_given(options: EngineOptions, covered: Covered, count: int) -> None:
    """Raise AttachError for options that do not go with `count` directions that are given."""
    if options.granularity == "pairwise" or not _by_direction(options):
        raise AttachError(
            f"a direction that is given with granularity={options.granularity!r} and strategy={options.strategy!r}: "
            "pairwise scores and gram need the validation rows"
        )
    if options.granularity in ("per_layer", "token") and count > 1:
        raise AttachError(f"several directions with granularity={options.granularity!r}: give one at a time")
    if options.granularity == "per_layer":
        check_ties_by_layer(options, covered)
