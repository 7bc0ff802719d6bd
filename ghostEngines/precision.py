"""Which operation runs in which dtype under `torch.autocast`."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: autocast's where it is on, else x's own. float64 is kept."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast_of(x: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on x's device; None if it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context without autocast.

    The engine chooses the dtype of each product itself, and a dot product of float32 tensors stays one
    wherever `backward()` is called.
    """
    return torch.autocast(x.device.type, enabled=False)
