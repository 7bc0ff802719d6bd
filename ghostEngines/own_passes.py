"""Passes of the model besides those of training: at any values of the parameters, and without a trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .contraction import accumulation_dtype
from .errors import AttachError
from .losses import losses_by_target
from .parameters import replaced
from .precision import autocast_of

Losses = Callable[[], Tensor]
"""Calls the model and returns its per-sample losses."""

NO_DERIVATIVE = (
    "they must call the model that the engine is attached to, and not a copy, and must not be detached"
)


def check_undivided(model: nn.Module, what: str) -> None:
    """Raise AttachError if parameters that train are divided among processes, which `what` cannot do with."""
    if any(isinstance(each, DTensor) for each in model.parameters() if each.requires_grad):
        raise AttachError(f"{what} needs whole parameters, and these are divided among processes (FSDP)")


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
    """Let the model run with other parameters during the block, and leave it, its buffers and random numbers as before.

    Inputs and buffers in half precision are widened where parameters are.

    Args:
        parameters: by name, as `widened` returns them.

    Raises:
        RuntimeError: the model itself casts to half precision, and its parameters are widened.
    """
    is_widened = any(parameters[name].dtype != p.dtype for name, p in model.named_parameters())
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(replaced(model, parameters))
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if is_widened:
            hook = model.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
            stack.callback(hook.remove)
            for module in model.modules():
                module._buffers |= {key: _widen(buffer) for key, buffer in module._buffers.items()}
        try:
            yield
        except RuntimeError as error:
            if is_widened and "dtype" in str(error):
                raise RuntimeError(
                    "passes of the engine's own run a half-precision model in float32, and this one casts to half "
                    f"precision itself: {error}"
                ) from error
            raise


@contextmanager
def autocast_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the model run under autocast of this dtype during the block; None: without autocast.

    Raises:
        RuntimeError: the model is called under another autocast, which the caller's losses must have entered, or
            enters one itself where there should be none.
    """
    weight = next(model.parameters())

    def check(module: nn.Module, *_: Any) -> None:
        # Within the model autocast may be left out of a part, but not added.
        if autocast_of(weight) not in ((dtype,) if module is model else (dtype, None)):
            raise RuntimeError(
                f"the {'losses' if module is model else 'model'} must not enter torch.autocast: exact values take "
                "gradients under the autocast of the training pass, which the loop enters around the model, and "
                "losses without any"
            )

    hooks = [module.register_forward_pre_hook(check) for module in model.modules()]
    try:
        with torch.autocast(weight.device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def per_sample(losses: Losses) -> Tensor:
    """Return the losses (n,); raise ValueError if they are of another shape."""
    found = losses()
    if found.dim() != 1 or len(found) == 0:
        raise ValueError(f"`losses` must return one loss per sample, (n,); got shape {tuple(found.shape)}")
    return found


def per_target(losses: Losses) -> Tensor:
    """Return the losses by target (n, T); raise ValueError if they are of another shape."""
    with losses_by_target():
        found = losses()
    if found.dim() != 2 or found.numel() == 0:
        raise ValueError(
            f"losses by target: `losses` must return the parts of each sample's loss, (n, T), whose sum over T is its "
            f"loss; got shape {tuple(found.shape)}. per_sample_losses and CrossEntropyHead return them where they are "
            "asked for (ghostEngines.losses_by_target): return what they return; or do the same in a loss of your own, "
            "where ghostEngines.are_by_target() is True"
        )
    return found


def mean_loss(model: nn.Module, losses: Losses, at: Mapping[str, Tensor] | None = None) -> float:
    """Return the mean of the losses at some values of the parameters, in nats.

    Args:
        at: by name; None: the parameters' own.
    """
    # With gradients enabled a model runs as in training. No graph is made, because no parameter requires one.
    with torch.enable_grad(), own_pass(model, widened(model, at)):
        return per_sample(losses).detach().double().mean().item()


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers that the model changes in the block, in place or by putting others into their places."""
    before = {module: dict(module._buffers) for module in model.modules()}
    copies = [
        (buffer, buffer.detach().clone())
        for buffers in before.values()
        for buffer in buffers.values()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, buffers in before.items():
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, copy in copies:
            if not torch.equal(buffer, copy):  # versions do not tell: .data changes without one
                buffer.detach().copy_(copy)


def _widen_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_widen, args)), {key: _widen(value) for key, value in kwargs.items()}


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(accumulation_dtype(value.dtype))
    return value
