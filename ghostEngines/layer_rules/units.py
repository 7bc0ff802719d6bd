"""Units: whole modules taken as one layer, slow but exact whatever they compute.

The gradient of one sample is that of the module rerun on that sample's part of its inputs. Modules that keep
stacked parameters of experts are units automatically, other modules if the user registers them
(`register_unit`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..row_maps import Samples
from .registry import LayerRule, anything_goes

UNITS: dict[type[nn.Module], LayerRule] = {}


def _by_rerun(layer: Any, inputs: tuple[Any, ...], backprops: Tensor) -> Any:
    raise AssertionError("a unit is run again, not described")


UNIT = LayerRule(_by_rerun, (), anything_goes, whole=True, unit=True)


def register_unit(*kinds: type[nn.Module]) -> None:
    """Take modules of exactly these types as one layer each, with all parameters in them.

    Such a module is rerun in the backward pass, forward and backward, once per row. Its share of a step's
    time is about doubled, and one sample's gradient at a time is in memory. Its output for a row must not
    depend on the other rows, which the first step checks.
    """
    for kind in kinds:
        UNITS[kind] = UNIT


def stacked_rule(layer: nn.Module) -> LayerRule | None:
    """Return the rule of a module with stacked parameters (experts, p, d); None for other modules."""
    own = [p for p in layer._parameters.values() if p is not None]
    return UNIT if any(p.dim() == 3 and min(p.shape) > 1 for p in own) else None


def part_of(value: Any, i: int, samples: Samples) -> Any:
    """Return sample i's part of an input or output.

    A tensor whose first dimension is a multiple of the number of samples has one sample's entries after the
    other's. Any other value belongs to all samples. So does every value if the samples are not the rows.
    """
    if samples.index is not None or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    each, rest = divmod(value.shape[0], samples.count)
    return value if rest else value[i * each : (i + 1) * each]


def backprop_of(gradient: Tensor, i: int, samples: Samples) -> Tensor:
    """Return the gradient of sample i's part of an output.

    If the samples are not the rows it is the whole gradient, with zeros at the other samples' entries.

    Raises:
        RuntimeError: it is unknown which entries belong to the sample.
    """
    if samples.index is None:
        part: Tensor = part_of(gradient, i, samples)
        return part
    row_map = samples.row_map(gradient.shape)
    if row_map is None:
        raise RuntimeError(
            f"a module that is taken as one layer has an output of shape {tuple(gradient.shape)}, of which it cannot "
            "be told what belongs to which sample: freeze its parameters"
        )
    this = torch.arange(samples.count, device=gradient.device) == i
    part = torch.zeros_like(gradient)
    own = row_map.of_rows(this, len(gradient))
    part[own] = gradient[own]
    return part


def rerun(
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    names: Sequence[str],
    i: int,
    samples: Samples,
) -> list[Tensor]:
    """Run a module on sample i's part of its inputs and return its floating-point outputs.

    Args:
        names: of the last inputs, which are passed by keyword.
    """
    parts = [part_of(each, i, samples) for each in inputs]
    positional = len(parts) - len(names)
    output = forward(*parts[:positional], **dict(zip(names, parts[positional:], strict=True)))
    return tensors_of(output)


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a module's output, a tensor or a tuple."""
    outputs = output if isinstance(output, tuple | list) else (output,)
    return [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]


def sample_gradients(
    forward: Callable[..., Any],
    parameters: Sequence[Tensor],
    inputs: Sequence[Any],
    names: Sequence[str],
    backprops: Sequence[Tensor | None],
    i: int,
    samples: Samples,
) -> list[Tensor]:
    """Return sample i's gradient of each parameter.

    Args:
        forward: runs the module with these very parameters.
        names: of the last inputs, which are passed by keyword.
        backprops: of the floating-point outputs; None for one on which the loss does not depend.
    """
    with torch.enable_grad():
        outputs = rerun(forward, inputs, names, i, samples)
    pairs = [
        (output, backprop_of(backprop, i, samples))
        for output, backprop in zip(outputs, backprops, strict=True)
        if backprop is not None and output.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(
        [output for output, _ in pairs], list(parameters), [part for _, part in pairs], allow_unused=True
    )
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
