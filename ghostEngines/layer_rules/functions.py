"""What the rules' autograd functions have in common: their behaviour under `torch.autocast`, and the tensors
they return."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x runs: autocast's where it is on, x's own otherwise (float64
    stays)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which nothing is cast silently: the functions below say themselves which product runs in
    which dtype, and a dot product of float32 tensors stays one wherever `backward()` is called."""
    return torch.autocast(x.device.type, enabled=False)


def as_shape(flat: Tensor, *shape: int) -> Tensor:
    """A fresh tensor in another shape, not a view of it: autograd forbids to change a view in place that an
    autograd function has returned, and a model may well do that."""
    fresh: Tensor = torch.ops.aten._unsafe_view(flat, shape)
    return fresh
