"""The output layer fused with its cross entropy: one loss per row, without the logits of all positions.

The logits, (n+m) · T · V numbers, are the largest tensor of a language model's training step. The head
computes them part by part and computes its own gradients from each part at once, so that no logits are kept
for the backward pass. A part is several rows, or a piece of one row, since losses and dot products are sums
over positions.

So the head must know the weights of the rows' losses in its forward pass. They are uniform without an engine;
with one they are those of its joint loss. The backward pass accepts only a common factor on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..contraction import Split, accumulation_dtype
from ..descriptions import Description
from ..losses import IGNORE_INDEX, are_by_target, count_targets, losses_of, require
from ..positions import check_positions
from ..precision import compute_dtype, without_autocast
from ..row_maps import Identity
from ..sinks import Site
from ..strategies import choose_strategy
from ..uses import Uses
from .head_gradient import HeadGradient, HeadPlan, Part
from .registry import register_rule

# The logits of this many positions are in memory at a time: enough for matrix products at full speed.
PART_POSITIONS = 512
# Softmax processes this many positions at a time, so that its temporaries stay in the cache.
SOFTMAX_POSITIONS = 64
# Both on a GPU, where each call has a cost.
GPU_POSITIONS = 2048


class CrossEntropyHead(nn.Module):
    """Output layer without bias, and cross entropy: (hidden, targets) -> per-sample losses.

    Its parameter is `weight` (V, d). To tie it, assign an embedding's weight to it.
    """

    def __init__(self, in_features: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, in_features))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden: Tensor, targets: Tensor) -> Any:
        """Return the mean cross entropy of each row over its own targets, in nats.

        With gradients, the backward pass accepts the gradient of `losses.mean()` times any factor, and
        nothing else.

        Args:
            hidden: (N, T, d).
            targets: (N, T), the token ids that follow; -100 for positions without a target.

        Returns:
            (N,) in float32 (float64 for float64 inputs); in `losses_by_target` (N, T).

        Raises:
            ValueError: a row without a target, or other shapes.
            RuntimeError: in `losses_by_target` with gradients.
        """
        rows = len(hidden)
        weights = hidden.new_full((rows,), 1 / rows, dtype=accumulation_dtype(hidden.dtype))
        return run_head(hidden, self.weight, targets, weights, plan=None)


def run_under_engine(layer: CrossEntropyHead, tapped: Any, hidden: Tensor, targets: Tensor) -> Any:
    """Return the losses (n+m,) of a head under the engine; its backward pass returns the dot products, too.

    Args:
        tapped: the head's TappedLayer.
    """
    pass_ = tapped.pass_
    if not isinstance(tapped.enter(hidden, (hidden, targets)), Identity):
        raise ValueError(
            f"layer '{tapped.name}' takes hidden states (rows, T, d), one row for each of the "
            f"{pass_.samples.count} samples; got {tuple(hidden.shape)}. Samples that are not rows need nn.Linear and "
            "per_sample_losses."
        )
    if pass_.split.positions:
        check_positions(tuple(hidden.shape[1:-1]), pass_.split.positions, f"'{tapped.name}.weight'")
    weight = layer.weight
    if pass_.guard is not None and pass_.guard.rehearsing:
        losses = run_head(hidden, weight.detach(), targets, pass_.guard.weights, plan=None)
        pass_.guard.losses.append(losses)
        return losses
    uses = pass_.uses.setdefault(tapped.group, Uses())
    position = uses.enter([weight], None)
    shared = uses.parameters[id(weight)]
    vocabulary, d = weight.shape
    plan = HeadPlan(
        pass_.sink,
        pass_.sink.strategy
        or head_strategy(pass_.split, hidden.shape[1], vocabulary, d, by_direction=pass_.sink.by_direction),
        tapped.probe,
        tapped.site("weight", weight) if weight.requires_grad else Site(weight.shape),
        uses,
        shared,
        position,
        shared.all_tokens() if shared.tokens else None,
    )
    return run_head(hidden, weight, targets, pass_.row_weights(), plan)


# always: a frozen head needs the row weights, too.
@register_rule(CrossEntropyHead, run=run_under_engine, product=True, always=True)
def cross_entropy_head(
    layer: CrossEntropyHead, inputs: tuple[Any, ...], backprops: Tensor
) -> dict[str, Description]:
    """Raise AssertionError: the head makes its gradients in its forward pass and is never described."""
    raise AssertionError("the fused head is not tapped")


def head_strategy(split: Split, positions: int, vocabulary: int, d: int, by_direction: bool = False) -> str:
    """Return the cheapest strategy, without gram if it would hold more validation logits than a part has."""
    by_direction = by_direction or split.m * positions > PART_POSITIONS
    return choose_strategy(split, positions, vocabulary, d, by_direction)


def run_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, plan: HeadPlan | None
) -> Any:
    """Return the losses (N,) with or without an engine.

    Args:
        hidden, weight, targets: (N, T, d), (V, d) and (N, T).
        row_weights: (N,), of each row's loss in the loss that is differentiated.
        plan: how to contract under an engine; None: no engine.
    """
    if hidden.dim() != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(
            f"the head takes hidden states (N, T, d) and targets (N, T), got {tuple(hidden.shape)} and "
            f"{tuple(targets.shape)}"
        )
    counts = count_targets(targets)
    known = (targets >= 0) & (targets < len(weight)) | (targets == IGNORE_INDEX)
    require(known.all(), f"a target is no token: ids go from 0 to {len(weight) - 1}, {IGNORE_INDEX} is none.")
    dtype = compute_dtype(hidden)
    no_gradients = not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))
    if plan is None and no_gradients:  # as in an evaluation and in a forward-mode pass
        return _losses_only(hidden, weight, targets, counts, dtype)
    if are_by_target():
        raise RuntimeError(
            "the fused head's losses by target are for passes without gradients, such as exact_values(by_target=True): "
            "its backward pass is that of the rows' losses; leave losses_by_target out of training"
        )
    probe, link = (None, None) if plan is None else (plan.probe, plan.uses.link)
    return FusedHead.apply(
        hidden, weight, probe, link, HeadTargets(targets, counts, row_weights), plan, dtype
    )


@dataclass(frozen=True, eq=False)
class HeadTargets:
    """The targets of a call, and how much each of them counts."""

    tokens: Tensor  # (N, T), -100 for none
    counts: Tensor  # (N,) the number of targets of each row
    row_weights: Tensor  # (N,) of each row's loss


class FusedHead(torch.autograd.Function):
    """Losses (N,) from hidden (N, T, d). The forward pass makes the gradients; the backward pass scales them.

    A part's residuals (g, t, V) are softmax minus one-hot, zero where there is no target. They are not
    multiplied by the row weights: in float16 nearly all of them would underflow to zero. The row's number of
    targets, relative to the smallest one of the batch, and a train row's weight, relative to the largest one,
    go into the other factor of the product, and all other factors into the float32 result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        probe: Tensor | None,
        link: Tensor | None,
        targets: HeadTargets,
        plan: HeadPlan | None,
        dtype: torch.dtype,
    ) -> Tensor:
        counts, row_weights = targets.counts, targets.row_weights
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        wide = accumulation_dtype(dtype)
        with without_autocast(hidden):
            matrix, rows = weight.to(dtype), hidden.to(dtype)  # (V, d), (N, T, d)
            fewest = counts.min().to(wide)
            n = len(rows) if plan is None else plan.split.n
            largest = row_weights[:n].max()
            relative = torch.ones_like(row_weights)
            relative[:n] = (row_weights[:n] / largest).nan_to_num(nan=0.0)  # NaN: all are zero
            share = (fewest / counts * relative).to(dtype)[:, None, None]  # (N, 1, 1), at most 1
            position_weights = (row_weights / counts)[:, None, None]
            losses = row_weights.new_zeros(len(rows))
            grad_hidden = hidden.new_empty(hidden.shape, dtype=wide) if needs_hidden else None
            gradient = HeadGradient.make(weight, wide, plan) if needs_weight else None
            for part, residuals, own in _residual_parts(rows, matrix, targets.tokens, plan):
                losses[part[0]] += own.sum(1) / counts[part[0]]
                if grad_hidden is not None:
                    torch.mul(residuals @ matrix, position_weights[part[0]], out=grad_hidden[part])
                if gradient is not None:
                    gradient.add(residuals, rows[part] * share[part[0]], part)
            if gradient is not None:
                gradient.seal()
            ctx.grad_hidden, ctx.gradient = grad_hidden, gradient
            ctx.hidden_dtype, ctx.spent = hidden.dtype, False
            ctx.save_for_backward(row_weights, largest / fewest, row_weights[-1] / fewest)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        row_weights, train_scale, val_scale = ctx.saved_tensors
        # A row with a weight, found without waiting for the device. If there is none, all gradients are zero.
        some = (row_weights != 0).int().argmax(0, keepdim=True)
        common = (grad_losses.take(some) / row_weights.take(some)).squeeze()
        common = torch.where(row_weights.any(), common, 1.0)
        require(
            torch.isclose(grad_losses, common * row_weights, rtol=1e-4, atol=0).all(),
            "the fused head made its gradients for the row weights of the joint loss, but another "
            "combination of its losses was differentiated. Call backward() on engine.joint_loss(losses), "
            "or on losses.mean() without an engine.",
        )
        if ctx.spent:
            raise RuntimeError(
                "backward() a second time: the fused head's gradients are gone after the first"
            )
        grad_hidden, gradient, ctx.spent = ctx.grad_hidden, ctx.gradient, True
        ctx.grad_hidden = ctx.gradient = None  # they are scaled in place
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(common).to(ctx.hidden_dtype)
        grad_weight = dots = None
        if gradient is not None:
            grad_weight, dots = gradient.finish(common * train_scale, common * val_scale)
        return grad_hidden, grad_weight, dots, *(None,) * 4


def _parts(rows: int, positions: int, split: Split | None, largest: int) -> Iterator[Part]:
    """Yield the parts, validation rows before train rows.

    A part is several rows, or a piece of a row that is longer than `largest` positions.
    """
    pieces = -(-positions // largest)
    group, length = max(1, largest // positions), -(-positions // pieces)
    bounds = [(0, rows)] if split is None else [(split.n, rows), (0, split.n)]
    for first, last in bounds:
        for row in range(first, last, group):
            for start in range(0, positions, length):
                yield slice(row, min(row + group, last)), slice(start, min(start + length, positions))


def _residual_parts(
    rows: Tensor, matrix: Tensor, targets: Tensor, plan: HeadPlan | None
) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Yield each part with its residuals (g, t, V), in a buffer that the next part overwrites, and its cross entropies
    (g, t), 0 where there is no target."""
    (n_rows, positions, _), vocabulary = rows.shape, len(matrix)
    largest = PART_POSITIONS if rows.device.type == "cpu" else GPU_POSITIONS
    parts = list(_parts(n_rows, positions, None if plan is None else plan.split, largest))
    buffer = rows.new_empty(max(targets[part].numel() for part in parts), vocabulary)
    for part in parts:
        part_targets = targets[part]  # (g, t)
        residuals = buffer[: part_targets.numel()]
        torch.mm(rows[part].flatten(0, 1), matrix.mT, out=residuals)
        own = residuals_from_logits(residuals, part_targets.flatten(), accumulation_dtype(rows.dtype))
        yield part, residuals.view(*part_targets.shape, vocabulary), own.view(part_targets.shape)


def residuals_from_logits(logits: Tensor, targets: Tensor, wide: torch.dtype) -> Tensor:
    """Replace logits (P, V) by softmax minus one-hot, in place; rows without a target become zero.

    Args:
        targets: (P,), -100 for none.
        wide: the dtype of softmax and of its sum.

    Returns:
        The cross entropy (P,) in nats, zero where there is no target.
    """
    position_losses = logits.new_empty(len(logits), dtype=wide)
    at_a_time = SOFTMAX_POSITIONS if logits.device.type == "cpu" else GPU_POSITIONS
    for start in range(0, len(logits), at_a_time):
        chunk = slice(start, start + at_a_time)
        valid = (targets[chunk] != IGNORE_INDEX)[:, None]
        index = targets[chunk, None].clamp(min=0)
        scores = logits[chunk].to(wide)  # the logits themselves, unless they are in half precision
        scores -= scores.amax(1, keepdim=True)
        target_scores = scores.gather(1, index)
        norm = scores.exp_().sum(1, keepdim=True)
        position_losses[chunk] = ((norm.log() - target_scores) * valid).squeeze(1)
        scores *= valid / norm
        scores.scatter_add_(1, index, -valid.to(wide))
        if scores.dtype != logits.dtype:
            logits[chunk] = scores
    return position_losses


def _losses_only(
    hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the losses without a backward pass: for an evaluation, and for forward-mode differentiation.

    They are those of rows (N,), or by target (N, T) in `losses_by_target`.

    The derivative of a position's loss is <residuals, W h' + W' h>, with h' and W' the tangents.
    """
    (hidden, hidden_tangent), (weight, weight_tangent) = map(forward_ad.unpack_dual, (hidden, weight))
    by_target = are_by_target()
    with without_autocast(hidden):
        wide = accumulation_dtype(dtype)
        losses = hidden.new_zeros(targets.shape if by_target else len(hidden), dtype=wide)
        rows, matrix, derivatives = hidden.to(dtype), weight.to(dtype), torch.zeros_like(losses)
        for part, residuals, own in _residual_parts(rows, matrix, targets, None):
            place, of_part = part if by_target else part[0], counts[part[0]]
            losses[place] += losses_of(own, of_part)
            if hidden_tangent is not None:
                change = (residuals @ matrix * hidden_tangent[part]).sum(2, dtype=wide)  # (g, t)
                derivatives[place] += losses_of(change, of_part)
            if weight_tangent is not None:
                change = (residuals @ weight_tangent.to(dtype) * rows[part]).sum(2, dtype=wide)
                derivatives[place] += losses_of(change, of_part)
    if hidden_tangent is None and weight_tangent is None:
        return losses
    dual: Tensor = forward_ad.make_dual(losses, derivatives)
    return dual
