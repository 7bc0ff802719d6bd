"""`nn.Embedding`: tokens, and positions, which most models look up once for all rows."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..contraction import Split, accumulation_dtype
from ..errors import AttachError
from ..memory import Keep
from ..preconditioner import Preconditioner
from ..step import LayerStep, TiedRoute
from .functions import as_shape, without_autocast
from .registry import register_rule


def _check(layer: nn.Embedding) -> None:
    for option, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if getattr(layer, option) != off:
            raise AttachError(
                f"nn.Embedding with {option}={getattr(layer, option)} is not covered: use {option}={off}."
            )


@register_rule(nn.Embedding, check=_check)
def embedding(layer: nn.Embedding, layer_step: LayerStep, input: Tensor) -> Any:
    """Token ids (n+m, ...) -> (n+m, ..., d).

    Tokens of shape (1, ...), such as the position ids of Hugging Face models, stand for all rows: the output
    is expanded, so that the gradient which comes back still has a sample dimension."""
    split = layer_step.step.split
    one_for_all = input.dim() > 1 and input.shape[0] == 1
    tokens = input.expand(split.n + split.m, *input.shape[1:]) if one_for_all else input
    step = layer_step.enter(tokens)
    output, gathered, picked, whole = ProbedEmbedding.apply(
        tokens,
        layer.weight,
        layer_step.probe,
        split,
        layer.padding_idx,
        layer_step.tied is not None,
        layer_step.keep("weight"),
        layer_step.preconditioner("weight"),
    )
    if layer_step.tied is not None:
        rows = tokens.reshape(len(tokens), -1)
        step.routes[layer_step.tied] = TiedRoute(
            gathered, picked, whole, rows[: split.n], rows[split.n :].flatten()
        )
    return output


class ProbedEmbedding(torch.autograd.Function):
    """y = W[tokens], and the three zero outputs of a `TiedRoute` (None for a weight that is not tied).

    The validation gradient E_v is kept for the validation rows' own tokens only: `slots` maps a token to its
    place among them, one of the positions at which it stands."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        probe: Tensor,
        split: Split,
        padding_idx: int | None,
        tied: bool,
        keep: Keep | None,
        preconditioner: Preconditioner | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        ctx.preconditioner = preconditioner
        ctx.split, ctx.padding_idx, ctx.vocabulary, ctx.keep = split, padding_idx, len(weight), keep
        ctx.save_for_backward(tokens)
        length, d = tokens[0].numel(), weight.shape[1]
        output = as_shape(weight.index_select(0, tokens.reshape(-1)), *tokens.shape, d)
        if not tied:
            return output, None, None, None
        gathered = probe.new_zeros(()).expand(split.directions, split.n, length, d)
        picked = probe.new_zeros(()).expand(split.n, split.m * length, d)
        whole = probe.new_zeros(()).expand(weight.shape)
        return output, gathered, picked, whole

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, backprops: Tensor, gathered: Tensor | None, picked: Tensor | None, whole: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        split, n, d = ctx.split, ctx.split.n, backprops.shape[-1]
        with without_autocast(backprops):
            tokens = tokens.reshape(len(tokens), -1)  # (n+m, L)
            backprops = backprops.reshape(*tokens.shape, d).to(accumulation_dtype(backprops.dtype))
            if ctx.padding_idx is not None:
                backprops = backprops.masked_fill((tokens == ctx.padding_idx)[..., None], 0)
            grad_weight = backprops.new_zeros(ctx.vocabulary, d) if whole is None else whole
            grad_weight.index_add_(0, tokens[:n].flatten(), backprops[:n].flatten(0, 1))
            val_backprops = backprops[n:]
            if ctx.preconditioner is not None:  # of which only the direction is made
                val_backprops = ctx.preconditioner.apply(val_backprops.clone(), tokens[n:])
            joint = tokens, val_backprops, split, ctx.vocabulary
            if gathered is None:
                at_tokens, _ = direction_at(*joint, ctx.keep)
            elif split.m > 0:
                at_tokens, direction = direction_at(*joint, None)
                at_tokens += gathered
                if ctx.keep is not None:  # the head's direction becomes that of the whole weight
                    whole_direction = ctx.keep.kept[ctx.keep.name][0]  # (V, d)
                    whole_direction.index_add_(0, tokens[n:].flatten(), val_backprops.flatten(0, 1))
            else:
                at_tokens = gathered  # from that direction
            dots = torch.einsum("nld,knld->nk", backprops[:n], at_tokens)
            if picked is not None and split.m > 0:
                dots = dots + picked.flatten(1) @ direction.flatten(1).mT
        return None, grad_weight, dots, *(None,) * 5


def direction_at(
    tokens: Tensor, val_backprops: Tensor, split: Split, vocabulary: int, keep: Keep | None
) -> tuple[Tensor, Tensor]:
    """tokens (n+m, L), val_backprops (m, L, d) -> the direction at the train rows' tokens (k, n, L, d), and
    by slot (k, U, d)."""
    n = split.n

    def make() -> tuple[Tensor, Tensor]:
        return validation_gradient(tokens[n:], val_backprops, split, vocabulary)

    direction, slots = make() if keep is None else keep.direction(make)
    seen = slots[tokens[:n]]  # (n, L), -1 where no validation row has the token
    return direction[:, seen.clamp(min=0)] * (seen >= 0)[..., None], direction


def validation_gradient(
    tokens: Tensor, backprops: Tensor, split: Split, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """tokens (m, L), backprops (m, L, d) -> the validation gradient (k, m·L, d) by slot, and the slots
    (vocabulary,).

    A token's slot is the last of the m·L positions at which it stands, -1 for a token of no validation row;
    the direction is zero at all other positions. So every shape is known beforehand and no device has to be
    waited for."""
    m, length, d = backprops.shape
    places = torch.arange(m * length, device=tokens.device)
    slots = places.new_full((vocabulary,), -1).scatter_reduce_(0, tokens.flatten(), places, "amax")
    direction = backprops.new_zeros(split.directions, m * length, d)
    index = slots[tokens]  # (m, L)
    if split.pairwise:
        index = index + places[:m, None] * (m * length)
    direction.view(-1, d).index_add_(0, index.flatten(), backprops.flatten(0, 1))
    return direction, slots
