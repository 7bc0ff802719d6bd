"""Passes of the model besides those of training: at any values of the parameters, and without a trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .contraction import accumulation_dtype
from .parameters import replaced
from .precision import autocast_of

Losses = Callable[[], Tensor]
"""Calls the model and returns its per-sample losses."""

NO_DERIVATIVE = (
    "they must call the model that the engine is attached to, and not a copy, and must not be detached"
)


def widened(model: nn.Module, at: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the model's parameters by name, in the accumulation dtype, without gradient.

    Args:
        at: values to take instead of the parameters' own, by name.
    """
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter if at is None or name not in at else at[name]
        found[name] = values.detach().to(accumulation_dtype(parameter.dtype))
    return found


@contextmanager
def own_pass(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model run with other parameters during the block, and leave it as it was: its buffers, too.

    Inputs in half precision are widened where parameters are.

    Args:
        parameters: by name, as `widened` returns them.
    """
    is_widened = any(parameters[name].dtype != p.dtype for name, p in model.named_parameters())
    with ExitStack() as stack:
        stack.enter_context(replaced(model, parameters))
        stack.enter_context(_restored_buffers(model))
        if is_widened:
            hook = model.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        yield


@contextmanager
def autocast_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the model run under autocast of this dtype during the block; None: without autocast.

    Raises:
        RuntimeError: the model is called under another autocast, which the caller's losses must have entered.
    """
    weight = next(model.parameters())

    def check(*_: Any) -> None:
        if autocast_of(weight) != dtype:
            raise RuntimeError(
                "the losses enter torch.autocast themselves: leave it out of them. Gradients are taken under the "
                "autocast of the last training pass, and losses without any"
            )

    hook = model.register_forward_pre_hook(check)
    try:
        with torch.autocast(weight.device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        hook.remove()


def per_sample(losses: Losses) -> Tensor:
    """Return the losses (n,); raise ValueError if they are of another shape."""
    found = losses()
    if found.dim() != 1 or len(found) == 0:
        raise ValueError(f"`losses` must return one loss per sample, (n,); got shape {tuple(found.shape)}")
    return found


@torch.no_grad()
def mean_loss(model: nn.Module, losses: Losses, at: Mapping[str, Tensor] | None = None) -> float:
    """Return the mean of the losses at some values of the parameters, in nats.

    Args:
        at: by name; None: the parameters' own.
    """
    with own_pass(model, widened(model, at)):
        return per_sample(losses).double().mean().item()


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers that the model changes in the block, in place or by putting others into their places."""
    places = [(module, key, buffer) for module in model.modules() for key, buffer in module._buffers.items()]
    copies = [None if buffer is None else buffer.detach().clone() for _, _, buffer in places]
    versions = [None if buffer is None else buffer._version for _, _, buffer in places]
    try:
        yield
    finally:
        for (module, key, buffer), copy, version in zip(places, copies, versions, strict=True):
            module._buffers[key] = buffer
            if buffer is not None and copy is not None and buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)


def _widen_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(accumulation_dtype(value.dtype))
        return value

    return tuple(map(widen, args)), {key: widen(value) for key, value in kwargs.items()}
