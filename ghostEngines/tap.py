"""The tap: an autograd function on the output of a layer's own forward, whose backward makes the layer's
training gradients and dot products.

The layer runs as it is, but with its trainable parameters detached, so that autograd computes the gradient of
its input and nothing else. The tap takes those parameters, and the probe, as inputs. Its backward sees the
backprops of the output: the rule describes each parameter's per-sample gradient, the sink contracts the
description, and the results are the gradients of the parameters and of the probe.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .contraction import accumulation_dtype
from .layer_rules.registry import LayerRule
from .precision import without_autocast
from .row_maps import RowMap, by_sample
from .sinks import DotProducts, Site

if TYPE_CHECKING:
    from .guard import Guard
    from .uses import Uses


@contextmanager
def swapped(parameters: Sequence[tuple[nn.Module, str]], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other tensors in the places of parameters while the block runs."""
    before = [module._parameters[key] for module, key in parameters]
    for (module, key), value in zip(parameters, values, strict=True):
        module._parameters[key] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for (module, key), value in zip(parameters, before, strict=True):
            module._parameters[key] = value


@dataclass(frozen=True, eq=False)
class Recomputable:
    """How a layer made its output, so that a layer which takes that output need not keep it for the backward
    pass: the first layer keeps its own input already, of the same size.

    version: of the output as the layer gave it. kept: the layer's inputs, and its parameters, whose versions
    autograd then checks.
    """

    run: Callable[[Tensor], Tensor]
    kept: tuple[Tensor, ...]
    version: int

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor, parameters: Sequence[Tensor], output: Tensor) -> "Recomputable":
        device = x.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def run(x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):
                result: Tensor = type(layer).forward(layer, x)
                return result

        return cls(run, (x.detach(), *(each.detach() for each in parameters)), output._version)


@dataclass(eq=False)
class Call:
    """One call of a covered layer in a forward pass: all that its backward needs but tensors of the graph."""

    layer: nn.Module
    rule: LayerRule
    names: tuple[str, ...]  # of the trainable parameters
    sites: tuple[Site, ...]
    sink: DotProducts
    row_map: RowMap
    inputs: tuple[Any, ...]  # as the forward got them, but for tensors, which autograd keeps
    made: Recomputable | None  # how the first input can be recomputed
    dtype: torch.dtype | None  # in which the first input is needed then
    parameters: tuple[Tensor, ...] = ()
    uses: "Uses | None" = None  # None in compiled code
    position: int = 0  # among those
    guard: "Guard | None" = None
    name: str = ""
    row_gradients: list[Tensor] | None = (
        None  # (N, *output) of an output without a sample dimension (joins.py)
    )
    free: bool = False  # the output has no sample dimension
    recomputed: bool = False  # the call was made by checkpointing, in the backward pass

    def guard_is_on(self) -> bool:
        """Return whether the backward pass under way is one of the guard's."""
        return self.guard is not None and self.guard.checking

    def restore(self, kept: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the inputs, from what autograd kept."""
        if self.made is not None:
            with torch.no_grad():
                x = self.made.run(kept[0])
            return (x if self.dtype is None else x.to(self.dtype), *self.inputs[1:])
        tensors = iter(kept)
        return tuple(next(tensors) if each is KEPT else each for each in self.inputs)

    def gradients(
        self, kept: Sequence[Tensor], backprops: Tensor
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the training gradient of each trainable parameter, and dots (n, k)."""
        inputs = self.restore(kept)
        if self.free:
            inputs, backprops = self._expanded(inputs)
        if self.rule.wide:
            dtype = accumulation_dtype(backprops.dtype)
            backprops = backprops.to(dtype)
            inputs = tuple(wide(each, dtype) for each in inputs)
        described = self.rule.describe(self.layer, inputs, backprops)
        gradients: list[Tensor | None] = []
        dots = []
        for i, name in enumerate(self.names):
            description = by_sample(described[name], self.row_map)
            if self.uses is None:
                gradient, own_dots = self.sink.take(self.sites[i], description)
            else:
                gradient, own_dots = self.uses.take(
                    self.sink, self.sites[i], self.parameters[i], self.position, description
                )
            gradients.append(gradient)
            if own_dots is not None:
                dots.append(own_dots)
        return gradients, torch.stack(dots).sum(0) if dots else None

    def _expanded(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor]:
        """An output without a sample dimension: the inputs stand for every sample."""
        if not self.row_gradients:
            raise RuntimeError(
                f"the output of layer '{self.name}' has no sample dimension, so that its gradient must be taken apart: "
                "call backward() on engine.joint_loss(losses)"
            )
        backprops = self.row_gradients[0]
        for more in self.row_gradients[1:]:
            backprops = backprops + more
        self.row_gradients = []
        rows = len(backprops)
        return tuple(
            each.expand(rows, *each.shape) if isinstance(each, Tensor) else each for each in inputs
        ), backprops


REENTRANT = (
    "reentrant activation checkpointing (use_reentrant=True) is not covered: its first pass runs without gradients, "
    "so that the engine does not see the step; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or "
    'gradient_checkpointing_enable({"use_reentrant": False}) of a Hugging Face model'
)


class _Kept:
    """The place of a tensor among a call's inputs."""


KEPT = _Kept()


def wide(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in the wide dtype, anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Tap(torch.autograd.Function):
    """Return the layer's output, as it is, and a link to the next use of the same parameters.

    Inputs: the call, the probe (n, k), the link of the use before (None for none), the output, the trainable
    parameters, and what the rule needs of the inputs. The output is `output.detach()`: a view of it could not be
    changed in place by the model, and in other forms of a copy autograd would not notice that it was.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, probe: Tensor, link: Tensor | None, output: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[len(call.names) :])
        ctx.others = len(tensors) - len(call.names)
        ctx.like = output.shape, output.dtype, output.device
        return output.detach(), probe.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor | None, link: Tensor | None) -> tuple[Tensor | None, ...]:
        call, nothing = ctx.call, (None,) * ctx.others
        if call.recomputed:
            raise RuntimeError(REENTRANT)
        if backprops is None:  # the loss does not depend on this output, but on that of a later use
            if call.uses is None or call.uses.calls == 1 or call.guard_is_on():
                return (None, None, None, None, *(None,) * len(call.names), *nothing)
            shape, dtype, device = ctx.like
            backprops = torch.zeros(shape, dtype=dtype, device=device)
        if call.guard is not None and call.guard.watches(call, backprops):
            return (None, None, None, backprops, *(None,) * len(call.names), *nothing)
        with without_autocast(backprops):
            gradients, dots = call.gradients(ctx.saved_tensors, backprops)
        return (None, dots, None, backprops, *gradients, *nothing)
