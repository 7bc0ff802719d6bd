"""torch.compile: the guard cannot see into compiled code, and some rules cannot run in it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from .errors import AttachError
from .passes import Pass
from .tapped import TappedLayer


def is_compiled(model: nn.Module) -> bool:
    """Return True if any module of the model was compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def eager() -> AbstractContextManager[None]:
    """Return a context in which compiled modules run uncompiled."""
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context


WHOLE_MODEL = (
    "the whole model is compiled, so that the engine cannot begin a pass before it: compile its blocks instead, "
    "block.compile()"
)


def check_whole_model(model: nn.Module) -> None:
    """Raise AttachError for a model that is compiled as a whole."""
    if model._compiled_call_impl is not None or isinstance(model, OptimizedModule):
        raise AttachError(WHOLE_MODEL)


def check_guarded_pass(pass_: Pass, layers: Iterable[TappedLayer]) -> None:
    """Raise RuntimeError if a guarded pass ran in code that the caller compiled around the model.

    Outside of compiled code every call of a layer is entered in `pass_.uses`."""
    if pass_.guard is not None and any(each.calls > 0 and each.group not in pass_.uses for each in layers):
        raise RuntimeError(WHOLE_MODEL)


def check_samples_in_uncompiled_code(model: nn.Module) -> None:
    """Raise AttachError for a compiled model whose samples are not its rows."""
    if is_compiled(model):
        raise AttachError(
            "samples that are not the model's rows can be followed in uncompiled code only: leave torch.compile out"
        )


def check_layers_in_uncompiled_code(model: nn.Module, layers: Iterable[TappedLayer]) -> None:
    """Raise RuntimeError for a layer in compiled code whose rule needs uncompiled code.

    The first step runs uncompiled. Without this check the error would appear at the second.
    """
    compiled = [name for name, each in model.named_modules() if each._compiled_call_impl is not None]
    for tapped in layers:
        inside = [name for name in compiled if not name or f"{tapped.name}.".startswith(f"{name}.")]
        if inside and (tapped.rule.parameter or tapped.rule.unit):
            raise RuntimeError(
                f"module '{tapped.name}' of type {type(tapped.layer).__name__} lies in compiled code "
                f"('{inside[0]}'), and its gradient can be followed in uncompiled code only: "
                "leave that module uncompiled"
            )
