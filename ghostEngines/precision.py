"""Which operation runs in which dtype under `torch.autocast`."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product of x runs: autocast's where it is on, x's own otherwise
    (float64 stays)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast_of(x: Tensor) -> torch.dtype | None:
    """Return the dtype of the autocast that is on for x's device, None if none is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which nothing is cast silently: the engine says itself which product runs in which
    dtype, and a dot product of float32 tensors stays one wherever `backward()` is called."""
    return torch.autocast(x.device.type, enabled=False)
