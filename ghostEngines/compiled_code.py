"""torch.compile: the guard cannot look into compiled code, and some rules cannot run in it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from .tapped import TappedLayer


def is_compiled(model: nn.Module) -> bool:
    """Return whether any module of the model was compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def eager() -> AbstractContextManager[None]:
    """Return a context in which compiled modules run uncompiled."""
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context


def check_layers_outside(model: nn.Module, layers: Iterable[TappedLayer]) -> None:
    """Raise RuntimeError for a layer in compiled code whose gradient can be computed in uncompiled code only.

    Called at the first step, which runs uncompiled, so that the error does not come at the second."""
    compiled = [name for name, each in model.named_modules() if each._compiled_call_impl is not None]
    for tapped in layers:
        inside = [name for name in compiled if not name or f"{tapped.name}.".startswith(f"{name}.")]
        if inside and (tapped.rule.parameter or tapped.rule.unit):
            raise RuntimeError(
                f"module '{tapped.name}' of type {type(tapped.layer).__name__} lies in compiled code "
                f"('{inside[0]}'), and its gradient can be followed in uncompiled code only: "
                "leave that module uncompiled"
            )
