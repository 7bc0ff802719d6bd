"""Exact values: what each train row of a step does for the validation loss, as the optimizer's own step has it.

A row's value is its Aumann-Shapley share (Aumann & Shapley, Values of Non-Atomic Games, 1974) of the fall of the
validation loss that the step's gradient causes. Let g = c·ḡ be the mean gradient of all rows after clipping by the
factor c, ĝ = ḡ/|ḡ|, and w_i the row's weight in the loss. The step moves the parameters by -lr·u(g). With G the
validation gradient, u(g) - u(0) = A∘g, J = u'(g) and W = G∘J (update_rules.py):

    value_i = lr·w_i·c·<z, ∇ℓ_i>,    z = G∘A + ln(1/c)·(W - <W, ĝ>·ĝ)

The second part is what clipping does: a row that lengthens ḡ shortens the others' part in the step. The values add
up to lr·<G, u(g) - u(0)>, clipped or not. The rest of the step's fall is lr·<G, u(0)>, the momentum of earlier
batches, and lr·<G, d>, the decay.

G is the mean of the validation gradients before and after the step: then all these parts add up to the measured fall
but for terms of third order in the step. The learning rate of each parameter's own group is inside the products.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .forward_mode import directional_derivatives
from .update_rules import Member, Update, Updates
from .validation_gradient import Losses, ValidationGradient, entries, point_after


@dataclass(frozen=True)
class ExactValues:
    """One step's values, and what else made the validation loss fall. All in nats; positive is a fall."""

    values: list[Tensor]  # (n,) for each micro-batch
    of_batch: float  # Σ values of the global batch: what the step's gradient does
    momentum: float  # what the gradients of earlier steps do
    decay: float  # what weight decay does
    measured: float  # the fall of the validation rows' mean loss over the step
    cosine: float  # between the validation gradients before and after the step

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
) -> ExactValues:
    """Compute the values of the coming update, between the clipping of the gradients and `optimizer.step()`.

    Two passes over the validation rows, before and after the update, and one forward-mode pass over the train rows.
    Nothing is changed: not the parameters, their gradients, nor the optimizer. Memory: two of the model's size.

    Args:
        train: for each micro-batch of this process, calls the model on its train rows.
        validation: calls the model on the validation rows.
        clip_factor: c, by which clipping multiplied the gradients; 1 if it did not.
        global_rows: train rows of the update, over all processes and micro-batches, which all weigh the same.
    """
    direction = ValidationGradient(model)
    before = direction.add(validation)
    length_before = direction.norm
    after = direction.add(validation, at=point_after(model, updates, with_gradients=True))
    cosine = (direction.product / (length_before * direction.norm)).item()  # NaN if one of them is zero
    measured = (before.double() - after.double()).item()
    clipping = math.log(1 / clip_factor)
    parts = _Parts(model, updates, direction.total, clipped=clipping > 0)
    parts.make_tangent(clipping)
    factor = clip_factor / global_rows
    values = [directional_derivatives(model, parts.tangent, each)[1] * factor for each in train]
    return ExactValues(values, parts.of_batch, parts.momentum, parts.decay, measured, cosine)


class _Parts:
    """The parts of a step's fall, and the tangent z with the learning rate in it."""

    def __init__(
        self, model: nn.Module, updates: Updates, twice_direction: dict[str, Tensor], *, clipped: bool
    ) -> None:
        """Compute all parts that are one number.

        Args:
            twice_direction: 2G by name; its memory becomes that of the tangent.
        """
        self._updates = updates
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        moved = {self._names[id(member.parameter)]: member.group["lr"] for member in self._moved()}
        self.tangent = {name: twice_direction[name].mul_(moved[name] / 2) for name in moved}  # lr·G, so far
        of_batch, momentum, decay, slope, square = torch.zeros(5, dtype=torch.float64).unbind()
        with torch.no_grad():
            for direction, gradient, update in self._pieces():
                of_batch += dot(direction, update.step - update.idle)
                momentum += dot(direction, update.idle)
                decay += dot(direction, update.decay)
                if clipped:
                    slope += dot(direction * update.slope(), gradient)
                    square += dot(gradient, gradient)
        self.of_batch, self.momentum, self.decay = of_batch.item(), momentum.item(), decay.item()
        self._along = (slope / square).item() if square > 0 else 0.0  # <W, ĝ>/|g|, times lr

    @torch.no_grad()
    def make_tangent(self, clipping: float) -> None:
        """Replace the direction by z. clipping: ln(1/c)."""
        for direction, gradient, update in self._pieces():
            if clipping == 0:
                direction.mul_(update.share())
            else:
                direction.mul_(torch.add(update.share(), update.slope(), alpha=clipping))
                direction.sub_(gradient, alpha=clipping * self._along)

    def _moved(self) -> Iterator[Member]:
        """Yield the parameters that the coming update moves: those with a gradient."""
        return (member for member in self._updates.members() if member.parameter.grad is not None)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Update]]:
        """Yield the direction, which may be changed in place, the gradient and the update of some entries, flat."""
        for member in self._moved():
            direction = self.tangent[self._names[id(member.parameter)]].view(-1)
            for part, gradient, some in entries(member, member.parameter.grad):
                update = self._updates.rule.update(some.group, some.state, some.parameter, gradient)
                yield direction[part], gradient, update


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> of two flat tensors, as a float64 number on the CPU."""
    return torch.dot(a, b).double().cpu()
