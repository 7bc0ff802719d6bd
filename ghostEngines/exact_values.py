"""Exact values: what each train row of a step does for the validation loss, as the optimizer's own step has it.

A row's value is its Aumann-Shapley share (Aumann & Shapley, Values of Non-Atomic Games, 1974) of the fall of the
validation loss that the step's gradient causes. Let g = c·ḡ be the mean gradient of all rows after clipping by the
factor c, ĝ = ḡ/|ḡ|, and w_i the row's weight in the loss. The step moves the parameters by -lr·u(g). With G the
validation gradient, u(g) - u(0) = A∘g, J = u'(g) and W = G∘J (update_rules.py):

    value_i = lr·w_i·c·<z, ∇ℓ_i>,    z = G∘A + ln(1/c)·(W - <W, ĝ>·ĝ)

The second part is what clipping does: a row that lengthens ḡ shortens the others' part in the step. The values add
up to lr·<G, u(g) - u(0)>, clipped or not. The learning rate of each parameter's own group is inside the products.

A step goes two ways, one after the other: from θ_t to the look-ahead point θ_∅, where it would end with g = 0, by
the momentum of earlier gradients and by decay; and from there to θ_{t+1}, by this batch. The fall on the first way
is measured. On the second one G is the mean of the validation gradients at both ends, so that the values add up to the
fall that is measured there but for terms of third order in the step. So a value speaks of the step without the row's
batch, and not of one without momentum.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .forward_mode import directional_derivatives
from .update_rules import Member, Update, Updates
from .validation_gradient import Losses, ValidationGradient, entries, point_after

# In half precision the gradients' own rounding is a large part of small values.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.5, torch.float16: 0.5}


@dataclass(frozen=True)
class ExactValues:
    """One step's values, and what else made the validation loss fall. All in nats; positive is a fall."""

    values: list[Tensor]  # (n,) for each micro-batch
    of_batch: float  # Σ values of the global batch: what its gradient does
    momentum: (
        float  # what the gradients of earlier steps do: the fall on the first way, without the decay's part
    )
    decay: float  # what weight decay does, to first order
    measured: float  # the fall of the validation rows' mean loss over the step
    cosine: float  # between the validation gradients at the ends of the batch's way

    @property
    def predicted(self) -> float:
        """Return the fall that is the sum of all parts."""
        return self.of_batch + self.momentum + self.decay


def exact_values(
    model: nn.Module,
    updates: Updates,
    train: Sequence[Losses],
    validation: Losses,
    *,
    clip_factor: float,
    global_rows: int,
    precision: torch.dtype,
) -> ExactValues:
    """Compute the values of the coming update, between the clipping of the gradients and `optimizer.step()`.

    Two passes over the validation rows, their losses once more, and one forward-mode pass over the train rows.
    Nothing is changed: not the parameters, their gradients, nor the optimizer. Memory: two of the model's size.

    Args:
        train: for each micro-batch of this process, calls the model on its train rows.
        validation: calls the model on the validation rows.
        clip_factor: c, by which clipping multiplied the gradients; 1 if it did not.
        global_rows: train rows of the update, over all processes and micro-batches, which all weigh the same.
        precision: the lowest one in the passes that made the gradients.

    Raises:
        ValueError: the values do not add up to what the update's gradient does.
    """
    direction, parts = ValidationGradient(model), _Parts(model, updates)
    with torch.no_grad():
        before = validation().mean().double()
    between = direction.add(validation, at=parts.look_ahead()).double()
    decay = parts.of_decay(direction.total)
    length = direction.norm
    after = direction.add(validation, at=point_after(model, updates, with_gradients=True))
    cosine = (direction.product / (length * direction.norm)).item()  # NaN if one of them is zero
    tangent, of_batch = parts.tangent(direction.total, math.log(1 / clip_factor))
    factor = clip_factor / global_rows
    values = [directional_derivatives(model, tangent, each)[1] * factor for each in train]
    if sum(map(len, values)) == global_rows:  # else other processes have the rest
        check_sum(values, of_batch, TOLERANCE[precision])
    momentum = (before - between).item() - decay
    return ExactValues(values, of_batch, momentum, decay, (before - after.double()).item(), cosine)


def check_sum(values: Sequence[Tensor], of_batch: float, tolerance: float) -> None:
    """Raise ValueError unless the values add up to what `.grad`, which they do not know, does in the update.

    Args:
        tolerance: largest distance, relative to the sum of the values' sizes.
    """
    every = torch.cat(list(values)).double()
    total, size = every.sum().item(), every.abs().sum().item()
    if not abs(total - of_batch) <= tolerance * max(size, abs(of_batch)):
        raise ValueError(
            f"the exact values of the batch add up to {total:.6g} nats, and its gradient makes the loss fall by "
            f"{of_batch:.6g}: `.grad` is not the gradient of these rows' mean loss, times clip_factor. Were other rows "
            "given, another clip_factor, or was the gradient changed after clipping?"
        )


Directions = dict[str, Tensor]
"""By name of the parameter."""


class _Parts:
    """The products of validation gradients with parts of the coming update."""

    def __init__(self, model: nn.Module, updates: Updates) -> None:
        self._updates, self._model = updates, model
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def look_ahead(self) -> Directions:
        """Return the look-ahead point of the parameters that the update moves."""
        idle = point_after(self._model, self._updates, with_gradients=False)
        return {
            self._names[id(each.parameter)]: idle[self._names[id(each.parameter)]] for each in self._moved()
        }

    @torch.no_grad()
    def of_decay(self, direction: Directions) -> float:
        """Return lr·<G, d>."""
        decay = torch.zeros((), dtype=torch.float64)
        for lr, own, _, update in self._pieces(direction):
            decay += lr * dot(own, update.decay)
        return decay.item()

    @torch.no_grad()
    def tangent(self, twice: Directions, clipping: float) -> tuple[Directions, float]:
        """Return z, with the learning rate in it, and lr·<G, u(g) - u(0)>.

        Args:
            twice: 2G; its memory becomes that of z.
            clipping: ln(1/c).
        """
        of_batch, slope, square = torch.zeros(3, dtype=torch.float64).unbind()
        for lr, own, gradient, update in self._pieces(twice):
            own.mul_(lr / 2)
            of_batch += dot(own, update.step - update.idle)
            if clipping > 0:
                slope += dot(own * update.slope(), gradient)
                square += dot(gradient, gradient)
        along = (slope / square).item() if square > 0 else 0.0  # <W, ĝ>/|g|, times lr
        for _, own, gradient, update in self._pieces(twice):
            if clipping == 0:
                own.mul_(update.share())
            else:
                own.mul_(torch.add(update.share(), update.slope(), alpha=clipping))
                own.sub_(gradient, alpha=clipping * along)
        moved = {self._names[id(member.parameter)] for member in self._moved()}
        return {name: each for name, each in twice.items() if name in moved}, of_batch.item()

    def _moved(self) -> Iterator[Member]:
        """Yield the parameters that the coming update moves: those with a gradient."""
        return (member for member in self._updates.members() if member.parameter.grad is not None)

    def _pieces(self, direction: Directions) -> Iterator[tuple[float, Tensor, Tensor, Update]]:
        """Yield lr, the direction, which may be changed in place, the gradient and the update of some entries."""
        for member in self._moved():
            flat = direction[self._names[id(member.parameter)]].view(-1)
            for part, gradient, some in entries(member, member.parameter.grad):
                update = self._updates.rule.update(some.group, some.state, some.parameter, gradient)
                yield float(some.group["lr"]), flat[part], gradient, update


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> of two flat tensors, as a float64 number on the CPU."""
    return torch.dot(a, b).double().cpu()
