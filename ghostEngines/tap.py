"""The tap: an autograd function on a layer's output that computes its training gradients and dot products.

The layer runs as it is, but with its trainable parameters detached. So autograd computes the gradient of the
layer's input and nothing else. The tap takes the parameters and the probe as inputs. Its backward pass
receives the backprops of the output: the rule describes each parameter's per-sample gradient, the sink
contracts the description, and the results are the gradients of the parameters and of the probe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .contraction import accumulation_dtype
from .descriptions import Description, PerSample, joined
from .layer_rules.registry import LayerRule
from .positions import ordered_by_position
from .precision import without_autocast
from .reruns import Rerun
from .row_maps import RowMap, by_sample
from .sinks import DotProducts, Site

if TYPE_CHECKING:
    from .guard import Guard
    from .uses import Uses


@dataclass(frozen=True, eq=False)
class Recomputable:
    """How a layer made its output.

    The next layer can recompute the output in the backward pass and need not keep it. Nothing more is kept:
    the first layer keeps its own input, of the same size, anyway.
    """

    run: Callable[[Tensor], Tensor]
    kept: tuple[Tensor, ...]  # the layer's input, and its parameters, so that autograd checks their versions
    version: int  # of the output as the layer returned it

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor, parameters: Sequence[Tensor], output: Tensor) -> "Recomputable":
        """Record how the layer made this output of x, and under which autocast."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def run(x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):
                result: Tensor = type(layer).forward(layer, x)
                return result

        return cls(run, (x.detach(), *(each.detach() for each in parameters)), output._version)


@dataclass(eq=False)
class Call:
    """One call of a covered layer: what its backward pass needs, except tensors of the graph."""

    layer: nn.Module
    rule: LayerRule
    names: tuple[str, ...]  # of the trainable parameters
    sites: tuple[Site, ...]
    sink: DotProducts
    row_map: RowMap
    inputs: tuple[Any, ...]  # with KEPT in the place of each tensor, which autograd keeps
    made: Recomputable | None  # how to recompute the first input
    dtype: torch.dtype | None  # of the recomputed input
    # Set outside of compiled code only.
    name: str = ""  # of the layer
    parameters: tuple[Tensor, ...] = ()
    uses: "Uses | None" = None
    position: int = 0  # among the uses
    guard: "Guard | None" = None
    free: bool = False  # the output has no sample dimension
    at_joins: list[Description] | None = None  # of a free output: its gradient as described at its joins
    checkpointed: bool = False  # what autograd keeps is recomputed, or moved, in the backward pass
    recomputed: bool = False  # checkpointing made this call in the backward pass
    rerun: Rerun | None = None  # of a unit

    def guard_is_on(self) -> bool:
        """Return True in one of the guard's own backward passes."""
        return self.guard is not None and self.guard.checking

    def restore(self, kept: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the inputs, given the tensors that autograd kept."""
        if self.made is not None:
            with torch.no_grad():
                x = self.made.run(kept[0])
            return (x if self.dtype is None else x.to(self.dtype), *self.inputs[1:])
        tensors = iter(kept)
        return tuple(next(tensors) if each is KEPT else each for each in self.inputs)

    def gradients(
        self, kept: Sequence[Tensor], backprops: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the training gradient of each trainable parameter, and dots (n, k)."""
        inputs = self.restore(kept)
        if self.rerun is not None:
            return self.rerun.gradients(self, inputs, backprops)
        (output_gradient,) = backprops
        assert output_gradient is not None
        described = (
            self._at_joins(inputs, output_gradient) if self.free else self._described(inputs, output_gradient)
        )
        gradients: list[Tensor | None] = []
        dots = []
        for i, name in enumerate(self.names):
            description = described[name] if self.free else by_sample(described[name], self.row_map)
            if self.sink.split.positions:
                description = ordered_by_position(
                    description, self.sites[i].shape, self.sink.split.positions, f"'{self.name}.{name}'"
                )
            gradient, own_dots = self.take(i, description)
            gradients.append(gradient)
            if own_dots is not None:
                dots.append(own_dots)
        return gradients, torch.stack(dots).sum(0) if dots else None

    def take(self, i: int, description: Description) -> tuple[Tensor | None, Tensor | None]:
        """Pass the description of parameter number i to the sink, together with those of its other uses."""
        if self.uses is None:
            return self.sink.take(self.sites[i], description)
        return self.uses.take(self.sink, self.sites[i], self.parameters[i], self.position, description)

    def _described(self, inputs: tuple[Any, ...], backprops: Tensor) -> Mapping[str, Description]:
        """Return the rule's descriptions."""
        if self.rule.parameter:  # in a pass of a single row: the whole gradient is that row's
            return {self.names[0]: PerSample(backprops[None])}
        if self.rule.wide:
            dtype = accumulation_dtype(backprops.dtype)
            backprops = backprops.to(dtype)
            inputs = tuple(wide(each, dtype) for each in inputs)
        return self.rule.describe(self.layer, inputs, backprops)

    def _at_joins(self, inputs: tuple[Any, ...], output: Tensor) -> Mapping[str, Description]:
        """Describe the parameters if the output has no sample dimension: all samples have the same inputs."""
        if self.at_joins is None:
            raise RuntimeError(
                f"the output of layer '{self.name}' has no sample dimension, so that its gradient must be taken "
                "apart: call backward() on engine.joint_loss(losses)"
            )
        together, self.at_joins = self.at_joins, []
        if not together:  # the loss does not depend on this use
            together = [PerSample(output.new_zeros(self.sink.split.n + self.sink.split.m, *output.shape))]
        if self.rule.parameter:
            by_position = self.sink.split.positions > 0
            return {self.names[0]: joined(together, self.sites[0].shape, by_position=by_position)}
        backprops = together[0]
        assert isinstance(backprops, PerSample)
        total = backprops.gradients
        for more in together[1:]:
            assert isinstance(more, PerSample)
            total = total + more.gradients
        each = (
            value.expand(len(total), *value.shape) if isinstance(value, Tensor) else value for value in inputs
        )
        return self._described(tuple(each), total)


REENTRANT = (
    "reentrant activation checkpointing (use_reentrant=True) is not covered: its first pass runs without gradients, "
    "so that the engine does not see the step; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or "
    'gradient_checkpointing_enable({"use_reentrant": False}) of a Hugging Face model'
)


class _Kept:
    """Mark the place of a tensor among a call's inputs."""


KEPT = _Kept()


def wide(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in the given dtype, and anything else unchanged."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Tap(torch.autograd.Function):
    """Return the layer's outputs unchanged, and a link to the next use of the same parameters.

    The inputs are the call, the probe (n, k), the link of the use before (None: there is none), the number of
    outputs, the outputs, the trainable parameters, and what the rule needs of the layer's inputs.

    An output is returned as `output.detach()`. The model could not change a view in place, and autograd would
    not detect that another kind of copy was changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, probe: Tensor, link: Tensor | None, outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.outputs = call, outputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[outputs + len(call.names) :])
        ctx.kept = len(tensors) - outputs - len(call.names)
        ctx.like = [(each.shape, each.dtype, each.device) for each in tensors[:outputs]]
        return (*(each.detach() for each in tensors[:outputs]), probe.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call, backprops = ctx.call, gradients[: ctx.outputs]
        nothing, no_gradients = (None,) * ctx.kept, (None,) * len(call.names)
        if call.recomputed:
            raise RuntimeError(REENTRANT)
        some = next((each for each in backprops if each is not None), None)
        if some is None:  # the loss depends on a later use of the parameters, not on this call
            if call.uses is None or call.uses.calls == 1 or call.guard_is_on():
                return (None, None, None, None, *backprops, *no_gradients, *nothing)
            backprops = tuple(torch.zeros(shape, dtype=kind, device=place) for shape, kind, place in ctx.like)
            some = backprops[0]
        assert some is not None
        if call.guard is not None and call.guard.watches(call, backprops):
            return (None, None, None, None, *backprops, *no_gradients, *nothing)
        with without_autocast(some):
            results, dots = call.gradients(ctx.saved_tensors, backprops)
        return (None, dots, None, None, *backprops, *results, *nothing)
