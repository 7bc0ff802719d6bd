"""What a piece of code allocates: every tensor that is made inside, seen below autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """counted(tensor) says which new tensors matter; views and results written in place are not new.

    largest: the bytes of the largest of their storages. peak: the most bytes that they had at one time.
    dtypes: of all of them.
    """

    def __init__(self, counted: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.counted = counted
        self.largest = self.peak = 0
        self.dtypes: set[torch.dtype] = set()
        self._live: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if has_storage(t)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if (
                has_storage(tensor)
                and tensor.untyped_storage().data_ptr() not in known
                and self.counted(tensor)
            ):
                storage = tensor.untyped_storage()
                self.dtypes.add(tensor.dtype)
                self.largest = max(self.largest, storage.nbytes())
                self._live.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        """The bytes that are still there."""
        self._live = [(reference, size) for reference, size in self._live if not reference.expired()]
        return sum(size for _, size in self._live)


def has_storage(value: Any) -> bool:
    """Whether it is a tensor with memory: a tangent that is zero has none."""
    return isinstance(value, Tensor) and not value._is_zerotensor()
