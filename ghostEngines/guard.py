"""The guard: a check at the first step that the rows do not depend on each other, and are in order.

It differentiates the losses of a random half of the rows. At the output of every covered layer the gradient
of all other rows must be exactly zero. Then it does the same with the other half. This detects rows in
another order, a first dimension that equals the batch size by chance, statistics over the batch, and tokens
gathered for experts, whatever the model's structure. The guard changes neither `.grad`, nor the random state,
nor the step that follows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import RowsError
from .row_maps import RowMap
from .tap import Call

# Largest accepted difference between the gradient at a layer's output and that of the joint loss alone,
# relative to its norm.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def halves(rows: int) -> list[Tensor]:
    """Return a random half of the rows and the other half, as masks (rows,); neither is empty.

    With few rows a half may be unchanged when rows change places. So of ten random halves this returns the
    one that detects the most of the likely changes: the reverse order, neighbours swapped, even rows before
    odd ones.
    """
    index, generator = torch.arange(rows), torch.Generator().manual_seed(0)
    neighbours = torch.where((index ^ 1) < rows, index ^ 1, index)
    changes = [index.flip(0), neighbours, torch.cat([index[::2], index[1::2]])]
    drawn = []
    for _ in range(10):
        half = torch.zeros(rows, dtype=torch.bool)
        half[torch.randperm(rows, generator=generator)[: max(1, rows // 2)]] = True
        drawn.append((sum(torch.equal(half[change], half) for change in changes), half))
    _, half = min(drawn, key=lambda pair: pair[0])
    return [half, ~half]


def separating_halves(rows: int) -> list[Tensor]:
    """Return masks (rows,) such that for every ordered pair of rows one has the first row and not the second.

    They are the halves given by the bits of the row index, and their complements.
    """
    index = torch.arange(rows)
    bits = [(index >> bit) & 1 == 1 for bit in range((rows - 1).bit_length())]
    return [mask for bit in bits for mask in (bit, ~bit)]


@dataclass
class GuardPlan:
    """When the guard runs: once for each size of batch."""

    enabled: bool
    halves: Callable[[int], list[Tensor]] = halves  # number of samples -> masks
    # `JointBatch.size` of the batches that were checked.
    checked: set[tuple[int, ...]] = field(default_factory=set)

    def needed(self, size: tuple[int, ...]) -> bool:
        """Return True if a batch of this size must be checked."""
        return self.enabled and size not in self.checked


class Guard:
    """What the guard sees in one step."""

    def __init__(self, masks: list[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Prepare one backward pass for each mask.

        Args:
            masks: (rows,) each, of the rows whose losses are differentiated.
            dtype: the lowest precision in the step.
        """
        self.masks = [mask.to(device) for mask in masks if mask.any()]
        self.checking = False  # True during one of the guard's own backward passes
        # A factor on the guard's losses: in float16 the gradients of small losses would underflow to zero.
        self.scale = 1024.0 if dtype == torch.float16 else 1.0
        self._tolerance = TOLERANCE[dtype]
        self._mask: Tensor
        self._passes = 0
        self._mixed: list[tuple[str, Tensor]] = []  # layer, and whether other rows had a gradient there
        # Fingerprints of backprops by layer and use: in the guard's first two passes, and of the joint loss.
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._joint: dict[tuple[str, int], Tensor] = {}
        # Rehearsals (guard_passes.py), for a head that makes its gradients in its forward pass.
        self.rehearsing = False  # True during one of the guard's own forward passes
        self.weights: Tensor  # of the rows' losses, (rows,)
        self.losses: list[Tensor] = []  # of the heads, (rows,) each

    def head_loss(self) -> Tensor:
        """Return the weighted sum of the heads' losses, and drop them, since they hold the graph."""
        loss = torch.stack([(losses * self.weights).sum() for losses in self.losses]).sum()
        self.losses.clear()
        return loss

    def begin(self, mask: Tensor) -> None:
        """Begin a backward pass from the losses of the rows in the mask."""
        self._mask, self.checking = mask, True
        self._passes += 1

    def end(self) -> None:
        """End the guard's backward pass."""
        self.checking = False

    def watches(self, call: Call, backprops: Sequence[Tensor | None]) -> bool:
        """Record the backprops of a call's outputs. Return True in the guard's own backward passes."""
        if not (call.free or call.rule.parameter):
            for each in backprops:
                if each is not None:
                    self._record(call, each)
        return self.checking

    def watches_rows(self, call: Call, gradient: Tensor, row_map: RowMap) -> bool:
        """Record the gradient (entries, ...) at a join. Return True in the guard's own backward passes."""
        if self.checking:
            self._check(call, gradient, row_map.of_rows(self._mask, len(gradient)))
        return self.checking

    def _record(self, call: Call, backprops: Tensor) -> None:
        prints = self._joint
        if self.checking:
            self._check(call, backprops, call.row_map.of_rows(self._mask, len(backprops)))
            if self._passes > 2:
                return  # the first two, a half and its complement, add up to the joint loss
            prints = self._seen
        key, own = (call.name, call.position), fingerprint(backprops)
        prints[key] = prints[key] + own if key in prints else own

    def _check(self, call: Call, gradient: Tensor, mask: Tensor) -> None:
        """Record whether an entry outside of the mask has a gradient."""
        others = gradient.detach()[~mask]
        name = f"{call.name}.{call.names[0]}".strip(".") if call.rule.parameter else call.name
        self._mixed.append((name, (others != 0).any()))

    def check_rows(self) -> None:
        """Raise RowsError if a row's loss has a gradient at another row of a covered layer's output."""
        mixed = list(dict.fromkeys(name for name, seen in self._mixed if seen))
        self._mixed.clear()
        if mixed:
            more = f" (and at {len(mixed) - 1} layers before it)" if len(mixed) > 1 else ""
            raise RowsError(
                f"the loss of a row has a gradient at other rows of the output of layer '{mixed[0]}'{more}: its "
                "scores would be of no single sample. Either the rows depend on each other (statistics over the "
                "batch, a contrastive loss), or the first dimension of the layer's input is not the sample, in "
                "order: rows are reordered in the model, several entries belong to one row, or a table is as long "
                "as the batch by chance (use another number of rows). Name the rows with row_maps, or freeze the "
                "layer's parameters."
            )

    def check_joint(self, scale: Tensor) -> None:
        """Raise RowsError if anything but the joint loss was differentiated.

        Args:
            scale: (scalar), the factor on the joint loss.
        """
        scale = scale / self.scale
        largest = max((each[0].sqrt() for each in self._joint.values()), default=scale)
        for key, got in self._joint.items():
            seen = self._seen.get(key, torch.zeros_like(got))  # zero: no row's loss depends on it
            want = seen * scale.to(got.dtype)
            # A gradient that consists of rounding errors is compared with the largest gradient.
            norm = torch.maximum(got[0].sqrt() + seen[0].sqrt() * scale.abs(), 1e-3 * largest.to(got.dtype))
            error = (got[1] - want[1]).abs()
            if error.isfinite() and error > self._tolerance * norm:
                raise RowsError(
                    f"the gradient at the output of layer '{key[0]}' is not that of engine.joint_loss(losses): "
                    "another term was added to the loss (a z-loss, load balancing, a regulariser), which is in no "
                    "row's loss and so in no score. Add it to each row's loss, or leave it out."
                )


def fingerprint(backprops: Tensor) -> Tensor:
    """Return the squared norm of a gradient and its product with a fixed pattern of signs, (2,).

    Both are sums over rows.
    """
    values = backprops.detach().flatten()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    signs = (torch.arange(len(values), device=values.device) * 2654435761 >> 7 & 1) * 2 - 1
    return torch.stack([values.square().sum(), (values * signs).sum()])


def random_states(device: torch.device) -> list[Any]:
    """Return the states of the random number generators that a forward pass could use."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    states = [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        (of_numpy["key"].tobytes(), of_numpy["pos"]),
    ]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return states


def check_random(before: list[Any], device: torch.device) -> None:
    """Raise RowsError if random numbers were drawn since the states `before`; do nothing for []."""
    if before and random_states(device) != before:
        raise RowsError(
            "the forward pass drew random numbers (F.dropout, dropout_p of an attention, layer drop, noise on "
            "embeddings): the scores would be of a random model, and the training not the one without "
            "validation rows. Switch it off."
        )
