"""The guard: at the first step, a check that rows do not depend on each other, and that the layers' first
dimensions are what the engine takes them for.

The losses of a random half of the rows are differentiated; at the output of every covered layer the gradient
of all other rows must be zero, exactly. Then the same with the other half. No structure of a model, and none
of a layer's input, can pass this by chance: rows in another order, a first dimension that is as long as the
batch by chance, statistics over the batch, tokens gathered for experts. Nothing of it reaches `.grad`, the
random state or the step that follows.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import RowsError
from .row_maps import RowMap
from .tap import Call

# How far the gradient at a layer's output may be from that of the joint loss alone, relative to its norm.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def halves(rows: int) -> list[Tensor]:
    """Return a random half of the rows and the other half, as masks (rows,); neither is empty.

    Of few rows a half may stay the same when the rows change places. Of some halves the one is taken that the
    most likely changes leave as it is least often: the reverse order, neighbours swapped, even rows before
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
    """Return the halves given by the bits of the row index, and their complements: for every ordered pair of
    rows one has the first row and not the second."""
    index = torch.arange(rows)
    bits = [(index >> bit) & 1 == 1 for bit in range((rows - 1).bit_length())]
    return [mask for bit in bits for mask in (bit, ~bit)]


class Guard:
    """What one guarded step sees. checking: a backward pass of the guard's own is under way."""

    def __init__(self, masks: list[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """masks (rows,): of the rows whose losses are differentiated, one pass each; dtype: the lowest
        precision of the step."""
        self.masks = [mask.to(device) for mask in masks if mask.any()]
        self.checking = False
        # A factor on the guard's losses: in float16 the gradients of small losses would flush to zero.
        self.scale = 1024.0 if dtype == torch.float16 else 1.0
        self._tolerance = TOLERANCE[dtype]
        # A forward pass of the guard's own is under way, for a head that makes its gradients in the forward.
        self.rehearsing = False
        self.weights: Tensor  # of the rows, in a rehearsal
        self.losses: list[Tensor] = []  # of the heads, in a rehearsal
        self._mask: Tensor
        self._passes = 0
        self._mixed: list[tuple[str, Tensor]] = []
        self._seen: dict[tuple[str, int], Tensor] = {}  # fingerprints of the joint loss's own backprops
        self._joint: dict[tuple[str, int], Tensor] = {}

    def head_loss(self) -> Tensor:
        """Return the weighted sum of the heads' losses in a rehearsal, and let go of them: they hold the graph."""
        loss = torch.stack([(losses * self.weights).sum() for losses in self.losses]).sum()
        self.losses.clear()
        return loss

    def begin(self, mask: Tensor) -> None:
        """Begin a backward pass from the losses of the rows in the mask."""
        self._mask, self.checking = mask, True
        self._passes += 1

    def end(self) -> None:
        self.checking = False

    def watches(self, call: Call, backprops: Sequence[Tensor | None]) -> bool:
        """Look at the backprops of a call's outputs; whether the pass is the guard's own."""
        if not (call.free or call.rule.parameter):
            for each in backprops:
                if each is not None:
                    self._look(call, each)
        return self.checking

    def watches_rows(self, call: Call, gradient: Tensor, row_map: RowMap) -> bool:
        """The same for the gradient (entries, ...) at a join."""
        if self.checking:
            self._note(call, gradient, row_map.of_rows(self._mask, len(gradient)))
        return self.checking

    def _look(self, call: Call, backprops: Tensor) -> None:
        prints = self._joint
        if self.checking:
            self._note(call, backprops, call.row_map.of_rows(self._mask, len(backprops)))
            if self._passes > 2:
                return  # the first two, a half and its complement, make up the joint loss
            prints = self._seen
        key, own = (call.name, call.position), fingerprint(backprops)
        prints[key] = prints[key] + own if key in prints else own

    def _note(self, call: Call, gradient: Tensor, mask: Tensor) -> None:
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
        """Raise RowsError if another term than the joint loss was differentiated. scale: the factor on it."""
        scale = scale / self.scale
        largest = max((each[0].sqrt() for each in self._joint.values()), default=scale)
        for key, got in self._joint.items():
            seen = self._seen.get(key, torch.zeros_like(got))  # zero: the rows' losses do not depend on it
            want = seen * scale.to(got.dtype)
            # A gradient of nothing but rounding is measured against the largest one.
            norm = torch.maximum(got[0].sqrt() + seen[0].sqrt() * scale.abs(), 1e-3 * largest.to(got.dtype))
            error = (got[1] - want[1]).abs()
            if error.isfinite() and error > self._tolerance * norm:
                raise RowsError(
                    f"the gradient at the output of layer '{key[0]}' is not that of engine.joint_loss(losses): "
                    "another term was added to the loss (a z-loss, load balancing, a regulariser), which is in no "
                    "row's loss and so in no score. Add it to each row's loss, or leave it out."
                )


def fingerprint(backprops: Tensor) -> Tensor:
    """Return two numbers of a gradient: its squared norm, and its product with a fixed pattern of signs. Both
    are sums over rows."""
    values = backprops.detach().flatten()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    signs = (torch.arange(len(values), device=values.device) * 2654435761 >> 7 & 1) * 2 - 1
    return torch.stack([values.square().sum(), (values * signs).sum()])


def random_states(device: torch.device) -> list[Any]:
    """Return the states of all random number generators that a forward pass could draw from."""
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
    """Raise RowsError if random numbers were drawn since the states `before`; [] is not checked."""
    if before and random_states(device) != before:
        raise RowsError(
            "the forward pass drew random numbers (F.dropout, dropout_p of an attention, layer drop, noise on "
            "embeddings): the scores would be of a random model, and the training not the one without "
            "validation rows. Switch it off."
        )
