"""Exact values: what each train row of a step does for the validation loss, as the optimizer's own step has it.

A row's value is its Aumann-Shapley share (Aumann & Shapley, Values of Non-Atomic Games, 1974) of the fall of the
validation loss that the step's gradient causes. Let g = c·ḡ be the mean gradient of all rows after clipping by the
factor c, ĝ = ḡ/|ḡ|, and w_i the row's weight in the loss. The step moves the parameters by -lr·u(g). With G and G'
validation gradients, u(g) - u(0) = A∘g, J = u'(g) and W = G'∘J (update_rules.py):

    value_i = lr·w_i·c·<z, ∇ℓ_i>,    z = G∘A + ln(1/c)·(W - <W, ĝ>·ĝ)

The second part is what clipping does: a row that lengthens ḡ shortens the others' part in the step. The values add
up to lr·<G, u(g) - u(0)>, clipped or not. The learning rate of each parameter's own group is inside the products.

A step goes two ways, one after the other: from θ_t to the look-ahead point θ_∅, where it would end with g = 0, by
the momentum of earlier gradients and by decay; and from there to θ_{t+1}, by this batch. The fall on the first way
is measured. On the second one G is the mean of the validation gradients at both ends, so that the values add up to the
fall that is measured there but for terms of third order in the step. So a value speaks of the step without the row's
batch, and not of one without momentum. G' is that at θ_{t+1}: an Aumann-Shapley share lets the weights of all rows
grow together from 0 to 1, and once ḡ is as long as clipping allows, which is at weight c, the step stays where it ends.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .forward_mode import directional_derivatives
from .own_passes import Losses, autocast_as, mean_loss
from .update_rules import Update
from .updates import Updates
from .validation_gradient import Combine, ValidationGradient, entries, point_after

# In half precision the gradients' own rounding is a large part of small values. Many float64 models round to float32
# inside, such as in Hugging Face's norms.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2, torch.bfloat16: 0.5, torch.float16: 0.5}

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
    by_target: list[Tensor] | None = None  # (n, T) each, which add up to `values`; None: not asked for

    @property
    def predicted(self) -> float:
        """Return the fall that is the sum of all parts."""
        return self.of_batch + self.momentum + self.decay

    @property
    def measured_of_batch(self) -> float:
        """Return the measured fall on the second way, which `of_batch` predicts."""
        return self.measured - self.momentum - self.decay


@dataclass(frozen=True)
class RowWeights:
    """The weights of the rows' losses in the update: all the same, or each its own."""

    count: int | None  # rows of the update over all processes and micro-batches, if all weigh the same
    each: Sequence[Tensor]  # (n,) for each micro-batch, if they do not

    @classmethod
    def of(cls, global_rows: int | None, row_weights: Sequence[Tensor] | None) -> Self:
        """Raise ValueError unless one of the two is given."""
        if (global_rows is None) == (row_weights is None):
            raise ValueError(
                "exact values need global_rows, if all rows of the update weigh the same, or row_weights: one of them"
            )
        return cls(global_rows, () if row_weights is None else row_weights)

    def apply(self, derivatives: Sequence[Tensor], factor: float) -> list[Tensor]:
        """Return the rows' derivatives (n, ...), by micro-batch, times their weights and a factor.

        Raises:
            ValueError: not as many weights as rows, or a weight that is negative or not finite.
        """
        if self.count is not None:
            if (found := sum(map(len, derivatives))) > self.count:
                raise ValueError(
                    f"exact values of {found} train rows of this process alone, and global_rows={self.count}"
                )
            return [each * (factor / self.count) for each in derivatives]
        weights = [tuple(each.shape) for each in self.each]
        rows = [tuple(each.shape[:1]) for each in derivatives]
        if weights != rows:
            raise ValueError(f"row_weights of shapes {weights}, by micro-batch, and losses of shapes {rows}")
        if not all(((each >= 0) & each.isfinite()).all() for each in self.each):
            raise ValueError("row_weights must be finite and not negative")
        return [
            derivative * (weight.to(derivative) * factor).view(-1, *[1] * (derivative.dim() - 1))
            for derivative, weight in zip(derivatives, self.each, strict=True)
        ]


def exact_values(
    model: nn.Module,
    updates: Updates,
    train: Sequence[Losses],
    validation: Losses,
    *,
    clip_factor: float,
    weights: RowWeights,
    autocast: torch.dtype | None,
    whole_batch: bool,
    by_target: bool = False,
) -> ExactValues:
    """Compute the values of the coming update, between the clipping of the gradients and `optimizer.step()`.

    Two passes over the validation rows, their losses once more, and one forward-mode pass over the train rows.
    Nothing is changed: not the parameters, their gradients, buffers, nor the optimizer. Memory: two of the model's
    size in float32. In a process group every process makes the call.

    Args:
        train: for each micro-batch of this process, calls the model on its train rows.
        validation: calls the model on the validation rows.
        clip_factor: c, by which clipping multiplied the gradients; 1 if it did not.
        weights: of the rows' losses in the update.
        autocast: its dtype in the passes that made the gradients, in which these are made, too; None: none.
            Losses are never under autocast: their falls would be lost in its rounding.
        whole_batch: `train` is on all rows of the update, so that their values must add up.
        by_target: also split each value by the targets in the row's loss: `train` then returns losses by target
            (own_passes.per_target). A target's part is lr·w_i·c·<z, gradient of its part of ℓ_i>.

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
    length, tangents = direction.norm, _Tangents(parts, math.log(1 / clip_factor))
    after = _loss_and_gradient(
        direction, validation, point_after(model, updates, with_gradients=True), autocast, tangents.make
    )
    cosine = (direction.product / (length * direction.norm)).item()  # NaN if one of them is zero
    tangent, of_batch, decay = tangents.finish(direction.total)
    if not math.isfinite(of_batch):
        raise ValueError("the gradient (.grad) or the validation rows' is not finite: leave such a step out")
    with autocast_as(model, autocast):
        found = [directional_derivatives(model, tangent, each, by_target=by_target)[1] for each in train]
    shares = weights.apply(found, clip_factor)
    values = [each.sum(1) for each in shares] if by_target else shares
    if whole_batch:
        dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        lowest = autocast or min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        check_sum(values, of_batch, weights.count, TOLERANCE[lowest])
    parts_of_values = shares if by_target else None
    return ExactValues(
        values, of_batch, before - between - decay, decay, before - after, cosine, parts_of_values
    )


def _loss_and_gradient(
    direction: ValidationGradient,
    losses: Losses,
    at: Directions,
    autocast: torch.dtype | None,
    combine: Combine | None = None,
) -> float:
    """Add the gradient at a point under autocast, and return the mean loss there without it."""
    with autocast_as(direction.model, autocast):
        loss = direction.add(losses, at, combine)
    if autocast is None:
        return loss.item()
    with autocast_as(direction.model, None):
        return mean_loss(direction.model, losses, at)


def check_sum(values: Sequence[Tensor], of_batch: float, global_rows: int | None, tolerance: float) -> None:
    """Check that the values add up to what `.grad`, which they do not know, does in the update.

    Args:
        global_rows: train rows over all processes and micro-batches; None: their weights are given instead.
        tolerance: largest distance, relative to the sum of the values' sizes.

    Raises:
        ValueError: they do not, or the rows of all processes are not `global_rows`.
    """
    every = torch.cat(list(values)).double()
    sums = torch.stack([every.sum(), every.abs().sum(), every.new_tensor(float(len(every)))])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    total, size, rows = sums.tolist()
    if global_rows is not None and rows != global_rows:
        raise ValueError(
            f"exact values of {rows:.0f} train rows, over all processes of the process group, and "
            f"global_rows={global_rows}: the update's own rows are needed, all of them, and no validation rows"
        )
    if not abs(total - of_batch) <= tolerance * max(size, abs(of_batch)):
        raise ValueError(
            f"the exact values of the batch add up to {total:.6g} nats, and its gradient makes the loss fall by "
            f"{of_batch:.6g}: `.grad` is not the gradient of these rows' losses, weighted, times clip_factor. Were "
            "other rows or weights given, another clip_factor, or was the gradient changed after clipping?"
        )


class _Parts:
    """The parameters that the coming update moves, and its pieces."""

    def __init__(self, model: nn.Module, updates: Updates) -> None:
        self._updates, self._model = updates, model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.moved = {names[id(member.parameter)]: member for member in updates.moved()}

    def look_ahead(self) -> Directions:
        """Return the look-ahead point of these parameters."""
        idle = point_after(self._model, self._updates, with_gradients=False)
        return {name: idle[name] for name in self.moved}

    def pieces(self, name: str) -> Iterator[tuple[slice, float, Tensor, Update]]:
        """Yield where some entries of a parameter lie in it, lr, their gradient and their update."""
        member = self.moved[name]
        for part, gradient, some in entries(member, member.parameter.grad):
            update = self._updates.rule.update(some.group, some.state, some.parameter, gradient)
            yield part, float(some.group["lr"]), gradient, update


class _Tangents:
    """z, with the learning rate in it, made of the validation gradients at both ends of the batch's way.

    Each parameter's is made as soon as the second gradient is there, in the first one's memory.
    """

    def __init__(self, parts: _Parts, clipping: float) -> None:
        """Take clipping = ln(1/c)."""
        self._parts, self._clipping = parts, clipping
        self._made: set[str] = set()
        device = next(iter(parts.moved.values())).parameter.device
        # Sums over all parameters, in float64 on the device, for which nobody waits.
        self._of_batch, self._decay, self._slope, self._square = torch.zeros(
            4, dtype=torch.float64, device=device
        ).unbind()

    def make(self, name: str, first: Tensor, last: Tensor) -> Tensor:
        """Return a parameter's z, but for what clipping takes from it along ĝ.

        Args:
            first, last: the validation gradients at θ_∅ and θ_{t+1}.
        """
        self._made.add(name)
        mean = first.add(last).div_(2)
        if name not in self._parts.moved:
            return mean
        for part, lr, gradient, update in self._parts.pieces(name):
            own = mean.view(-1)[part].mul_(lr)
            self._of_batch += torch.dot(own, update.step() - update.idle())
            self._decay += lr * torch.dot(first.view(-1)[part], update.decay())
            own.mul_(update.share())
            if self._clipping > 0:
                slope = update.slope().mul_(last.reshape(-1)[part]).mul_(lr)  # W, times lr
                self._slope += torch.dot(slope, gradient)
                self._square += torch.dot(gradient, gradient)
                own.add_(slope, alpha=self._clipping)
        return mean

    @torch.no_grad()
    def finish(self, made: Directions) -> tuple[Directions, float, float]:
        """Return z, lr·<G, u(g) - u(0)> and lr·<G(θ_∅), d>.

        Args:
            made: what `make` returned; z takes its memory.
        """
        tangent = {name: made[name] for name in self._parts.moved}
        for name in tangent.keys() - self._made:  # the second pass did not use it, such as an expert
            tangent[name] = self.make(name, tangent[name], torch.zeros_like(tangent[name]))
        if self._clipping > 0 and self._square > 0:
            along = (self._slope / self._square).item()  # <W, ĝ>/|g|, times lr
            for name, member in self._parts.moved.items():
                gradient = member.parameter.grad
                assert gradient is not None
                tangent[name].sub_(gradient, alpha=self._clipping * along)
        return tangent, self._of_batch.item(), self._decay.item()
