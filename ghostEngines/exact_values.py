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
import torch.distributed as dist
from torch import Tensor, nn

from .forward_mode import directional_derivatives
from .own_passes import Losses, autocast_as, mean_loss
from .update_rules import Update
from .updates import Updates
from .validation_gradient import ValidationGradient, entries, point_after

# In half precision the gradients' own rounding is a large part of small values.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.5, torch.float16: 0.5}

Directions = dict[str, Tensor]
"""By name of the parameter."""


@dataclass(frozen=True)
class ExactValues:
    """One step's values, and what else made the validation loss fall. All in nats; positive is a fall."""

    values: list[Tensor]  # (n,) for each micro-batch
    of_batch: float  # Σ values of the global batch: what its gradient does
    momentum: float  # what earlier gradients do: the fall on the first way, without the decay's part
    decay: float  # what weight decay does, to first order
    measured: float  # the fall of the validation rows' mean loss over the step
    cosine: float  # between the validation gradients at the ends of the batch's way

    @property
    def predicted(self) -> float:
        """Return the fall that is the sum of all parts."""
        return self.of_batch + self.momentum + self.decay

    @property
    def measured_of_batch(self) -> float:
        """Return the measured fall on the second way, which `of_batch` predicts."""
        return self.measured - self.momentum - self.decay


def exact_values(
    model: nn.Module,
    updates: Updates,
    train: Sequence[Losses],
    validation: Losses,
    *,
    clip_factor: float,
    global_rows: int,
    autocast: torch.dtype | None,
    whole_batch: bool,
) -> ExactValues:
    """Compute the values of the coming update, between the clipping of the gradients and `optimizer.step()`.

    Two passes over the validation rows, their losses once more, and one forward-mode pass over the train rows.
    Nothing is changed: not the parameters, their gradients, buffers, nor the optimizer. Memory: two of the model's
    size in float32. In a process group every process makes the call.

    Args:
        train: for each micro-batch of this process, calls the model on its train rows.
        validation: calls the model on the validation rows.
        clip_factor: c, by which clipping multiplied the gradients; 1 if it did not.
        global_rows: train rows of the update, over all processes and micro-batches, which all weigh the same.
        autocast: its dtype in the passes that made the gradients, in which these are made, too; None: none.
            Losses are never under autocast: their falls would be lost in its rounding.
        whole_batch: `train` is on all rows of the update, so that their values must add up.

    Raises:
        ValueError: clip_factor is not between 0 and 1; the rows are not all of the update's; the values do not
            add up to what the update's gradient does.
    """
    if not 0 < clip_factor <= 1:
        raise ValueError(
            f"clip_factor={clip_factor}: clipping multiplies a gradient by more than 0, and at most 1"
        )
    if not train:
        raise ValueError("exact values of no rows: `train` needs one function for each micro-batch")
    direction, parts = ValidationGradient(model), _Parts(model, updates)
    with autocast_as(model, None):
        before = mean_loss(model, validation)
    between = _loss_and_gradient(direction, validation, parts.look_ahead(), autocast)
    decay, length = parts.of_decay(direction.total), direction.norm
    after = _loss_and_gradient(
        direction, validation, point_after(model, updates, with_gradients=True), autocast
    )
    cosine = (direction.product / (length * direction.norm)).item()  # NaN if one of them is zero
    tangent, of_batch = parts.tangent(direction.total, math.log(1 / clip_factor))
    if not math.isfinite(of_batch):
        raise ValueError("the gradient (.grad) or the validation rows' is not finite: leave such a step out")
    with autocast_as(model, autocast):
        derivatives = [directional_derivatives(model, tangent, each)[1] for each in train]
    values = [each * (clip_factor / global_rows) for each in derivatives]
    if whole_batch:
        dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        lowest = autocast or min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        check_sum(values, of_batch, global_rows, TOLERANCE[lowest])
    return ExactValues(values, of_batch, before - between - decay, decay, before - after, cosine)


def _loss_and_gradient(
    direction: ValidationGradient, losses: Losses, at: Directions, autocast: torch.dtype | None
) -> float:
    """Add the gradient at a point under autocast, and return the mean loss there without it."""
    with autocast_as(direction.model, autocast):
        loss = direction.add(losses, at)
    if autocast is None:
        return loss.item()
    with autocast_as(direction.model, None):
        return mean_loss(direction.model, losses, at)


def check_sum(values: Sequence[Tensor], of_batch: float, global_rows: int, tolerance: float) -> None:
    """Check that the values add up to what `.grad`, which they do not know, does in the update.

    Args:
        tolerance: largest distance, relative to the sum of the values' sizes.

    Raises:
        ValueError: they do not, or the rows of all processes are not `global_rows`.
    """
    every = torch.cat(list(values)).double()
    sums = torch.stack([every.sum(), every.abs().sum(), every.new_tensor(float(len(every)))])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    total, size, rows = sums.tolist()
    if rows != global_rows:
        raise ValueError(
            f"exact values of {rows:.0f} train rows, over all processes of the process group, and "
            f"global_rows={global_rows}: the update's own rows are needed, all of them, and no validation rows"
        )
    if not abs(total - of_batch) <= tolerance * max(size, abs(of_batch)):
        raise ValueError(
            f"the exact values of the batch add up to {total:.6g} nats, and its gradient makes the loss fall by "
            f"{of_batch:.6g}: `.grad` is not the gradient of these rows' mean loss, times clip_factor. Were other rows "
            "given, another clip_factor, or was the gradient changed after clipping?"
        )


class _Parts:
    """The products of validation gradients with parts of the coming update."""

    def __init__(self, model: nn.Module, updates: Updates) -> None:
        self._updates, self._model = updates, model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._moved = [(names[id(member.parameter)], member) for member in updates.moved()]

    def look_ahead(self) -> Directions:
        """Return the look-ahead point of the parameters that the update moves."""
        idle = point_after(self._model, self._updates, with_gradients=False)
        return {name: idle[name] for name, _ in self._moved}

    @torch.no_grad()
    def of_decay(self, direction: Directions) -> float:
        """Return lr·<G, d>."""
        decay = self._zero()
        for lr, own, _, update in self._pieces(direction):
            decay += lr * torch.dot(own, update.decay())
        return decay.item()

    @torch.no_grad()
    def tangent(self, twice: Directions, clipping: float) -> tuple[Directions, float]:
        """Return z, with the learning rate in it, and lr·<G, u(g) - u(0)>.

        Args:
            twice: 2G; its memory becomes that of z.
            clipping: ln(1/c).
        """
        of_batch, slope, square = self._zero(), self._zero(), self._zero()
        for lr, own, gradient, update in self._pieces(twice):
            own.mul_(lr / 2)
            of_batch += torch.dot(own, update.step() - update.idle())
            factor = update.share()
            if clipping > 0:
                own_slope = update.slope()
                slope += torch.dot(own * own_slope, gradient)
                square += torch.dot(gradient, gradient)
                factor.add_(own_slope, alpha=clipping)
            own.mul_(factor)
        tangent = {name: twice[name] for name, _ in self._moved}
        if clipping > 0 and square > 0:
            along = (slope / square).item()  # <W, ĝ>/|g|, times lr
            for name, member in self._moved:
                whole = member.parameter.grad
                assert whole is not None
                tangent[name].sub_(whole, alpha=clipping * along)
        return tangent, of_batch.item()

    def _zero(self) -> Tensor:
        """Return a sum of nothing, in float64 and on the model's device, for which nobody waits."""
        (_, first), *_ = self._moved
        return torch.zeros((), dtype=torch.float64, device=first.parameter.device)

    def _pieces(self, direction: Directions) -> Iterator[tuple[float, Tensor, Tensor, Update]]:
        """Yield lr, the direction, which may be changed in place, the gradient and the update of some entries."""
        for name, member in self._moved:
            flat = direction[name].view(-1)
            for part, gradient, some in entries(member, member.parameter.grad):
                update = self._updates.rule.update(some.group, some.state, some.parameter, gradient)
                yield float(some.group["lr"]), flat[part], gradient, update
