"""The sink of descriptions: DotProducts computes training gradients and dot products from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contraction import (
    Split,
    Validation,
    Whole,
    accumulation_dtype,
    direction_of,
)
from .descriptions import Description, Matrix, PerPosition, PerSample, Rows, Streamed, per_sample_sums
from .memory import Keep, Scratch
from .picked import Picked, PickedByPosition, picking
from .positions import add_uses, without_positions
from .preconditioner import Preconditioner
from .strategies import STRATEGIES, Strategy, choose_strategy


@dataclass(frozen=True)
class Site:
    """What a sink needs to know of one parameter in one pass."""

    shape: torch.Size  # of the parameter
    keep: Keep | None = None  # where its direction is kept for other micro-batches; None for a single batch
    preconditioner: Preconditioner | None = None  # of its direction; None: nothing is multiplied


Taken = tuple[Tensor, Tensor]
"""The gradient of the train rows, of the parameter's shape, and dots (n, k), or (n, T) by position."""


@dataclass(frozen=True)
class HeadPart:
    """An output layer's part of a weight (V, d) that it shares with lookups.

    Let E be the weight's gradient from the lookups and H that from the output layer. Then <E_i + H_i, E_v +
    H_v> has two cross terms: <E_i, H_v> = Σ_t g_it · H_v[x_it] and <H_i, E_v> = Σ_u H_i[u] · E_v[u].
    """

    total: Tensor  # (V, d): Σ_i H_i; the lookups add their rows to it in place
    gathered: Tensor  # (k, n, L, d): H_v at the train rows' tokens, preconditioned
    picked: Picked | PickedByPosition  # H_i at the validation rows' tokens


@dataclass(frozen=True)
class DotProducts:
    """Compute <G_i, D> for all train rows, with D the direction, and the training gradient Σ_i G_i."""

    split: Split
    scratch: Scratch
    strategy: str | None = None  # that every matrix must use; None: chosen by shape
    by_direction: bool = False  # the direction itself is needed: it is kept, or preconditioned

    def take(self, site: Site, description: Description) -> Taken:
        """Return the training gradient and the dot products of one parameter."""
        if isinstance(description, Matrix):
            left, right = description.factors()
            total, dots = self.matrix(site, left, right)
        elif isinstance(description, Rows):
            total, dots = self.rows(site, description, None)
        elif isinstance(description, Streamed):
            total, dots = self.streamed(site, description)
        else:
            total, dots = self.small(site, description)
        return total.view(site.shape), dots

    def strategy_for(self, positions: int, p: int, d: int) -> Strategy:
        """Return the strategy for a (p, d) weight whose input has this many positions."""
        name = self.strategy or choose_strategy(self.split, positions, p, d, self.by_direction)
        return STRATEGIES[name]

    def matrix(self, site: Site, left: Tensor, right: Tensor) -> Taken:
        """Contract left (n+m, T, p) and right (n+m, T, d). Returns the gradient (p, d) and dots (n, k)."""
        n = self.split.n
        strategy = self.strategy_for(left.shape[1], left.shape[2], right.shape[2])
        total = left.new_empty(left.shape[2], right.shape[2], dtype=accumulation_dtype(left.dtype))
        preconditioner = site.preconditioner
        if preconditioner is not None:
            preconditioner = preconditioner.shaped(total.shape)
        against: Whole | Validation = Validation(
            left[n:], right[n:], self.split, preconditioner, self.scratch
        )
        if site.keep is not None:
            against = Whole(site.keep.direction(against.whole).view(-1, *total.shape))
        if self.split.positions:
            own = strategy.contract_by_position(left[:n], right[:n], against, total, True, self.scratch)
            return total, add_uses(own, self.split.positions)
        dots = strategy.contract(left[:n], right[:n], against, total, True, self.scratch)
        return total, dots

    def small(self, site: Site, description: PerPosition | PerSample) -> Taken:
        """Contract per-sample gradients that are written out."""
        if isinstance(description, PerSample):
            gradients = description.gradients
            gradients = gradients.to(accumulation_dtype(gradients.dtype))
        else:
            gradients = per_sample_sums(description.gradients, site.shape)
        train, val = gradients[: self.split.n], gradients[self.split.n :]

        def make() -> Tensor:
            direction = val if self.split.pairwise else val.sum(0, keepdim=True)
            return direction if site.preconditioner is None else site.preconditioner.apply(direction)

        direction = make() if site.keep is None else site.keep.direction(make)
        direction = direction.reshape(len(direction), -1)
        if self.split.positions:
            if isinstance(description, PerSample):
                raise without_positions(f"a parameter of shape {tuple(site.shape)}")
            own = description.gradients[: self.split.n].reshape(self.split.n, -1, site.shape.numel())
            return train.sum(0), add_uses(own.to(direction.dtype) @ direction[0], self.split.positions)
        return train.sum(0), train.reshape(self.split.n, -1) @ direction.mT

    def streamed(self, site: Site, description: Streamed) -> Taken:
        """Contract gradients that are made one sample at a time, the validation rows first."""
        n, rows = self.split.n, range(self.split.n, description.samples)

        def make() -> Tensor:
            if self.split.pairwise:
                direction = torch.stack([description.gradient(i) for i in rows])
            else:
                direction = description.gradient(rows[0])[None].clone()
                for i in rows[1:]:
                    direction += description.gradient(i)
            return direction if site.preconditioner is None else site.preconditioner.apply(direction)

        direction = make() if site.keep is None else site.keep.direction(make)
        direction = direction.reshape(len(direction), -1)
        total = direction.new_zeros(site.shape.numel())
        dots = []
        for i in range(n):
            gradient = description.gradient(i).flatten()
            dots.append(direction @ gradient)
            total += gradient
        return total, torch.stack(dots)

    def together(
        self, sites: Sequence[Site], gradients: Callable[[int], list[Tensor]], samples: int
    ) -> tuple[list[Tensor], Tensor]:
        """Contract several parameters whose gradients are made together, one sample at a time.

        Args:
            gradients: returns sample i's gradient of each parameter.
            samples: N.

        Returns:
            The training gradients, and the sum of the dots over the parameters (n, k).
        """
        n, directions = self.split.n, self._directions(sites, gradients, range(self.split.n, samples))
        totals: list[Tensor] = []
        dots = []
        for i in range(n):
            own = [each.to(accumulation_dtype(each.dtype)) for each in gradients(i)]
            dots.append(
                torch.stack(
                    [d.reshape(len(d), -1) @ g.flatten() for d, g in zip(directions, own, strict=True)]
                ).sum(0)
            )
            if totals:
                torch._foreach_add_(totals, own)
            else:
                totals = [each.clone() for each in own]
        return totals, torch.stack(dots)

    def _directions(
        self, sites: Sequence[Site], gradients: Callable[[int], list[Tensor]], rows: range
    ) -> list[Tensor]:
        """Return the direction of each parameter (k, *shape)."""
        made: list[Tensor] = []
        if len(rows) > 0:
            of_rows = (
                [[g.to(accumulation_dtype(g.dtype)) for g in gradients(j)] for j in rows]
                if self.split.pairwise
                else []
            )
            if self.split.pairwise:
                made = [torch.stack(each) for each in zip(*of_rows, strict=True)]
            else:
                for j in rows:
                    own = [g.to(accumulation_dtype(g.dtype))[None] for g in gradients(j)]
                    made = [a + b for a, b in zip(made, own, strict=True)] if made else own
        directions = []
        for number, site in enumerate(sites):

            def make(number: int = number, site: Site = site) -> Tensor:
                return (
                    made[number]
                    if site.preconditioner is None
                    else site.preconditioner.apply(made[number].clone())
                )

            directions.append(make() if site.keep is None else site.keep.direction(make))
        return directions

    def rows(self, site: Site, lookups: Rows, head: HeadPart | None) -> Taken:
        """Contract lookups, which may share their weight with an output layer.

        Args:
            head: the output layer's part; None: there is no such layer.
        """
        split, n, vocabulary = self.split, self.split.n, site.shape[0]
        tokens, gradients = lookups.flat()  # (n+m, L), (n+m, L, d)
        gradients = gradients.to(accumulation_dtype(gradients.dtype))
        if lookups.ignored is not None:
            gradients = gradients.masked_fill((tokens == lookups.ignored)[..., None], 0)
        total = gradients.new_zeros(site.shape) if head is None else head.total
        total.index_add_(0, tokens[:n].flatten(), gradients[:n].flatten(0, 1))
        val_gradients = gradients[n:]
        if site.preconditioner is not None:  # used for the direction only
            val_gradients = site.preconditioner.apply(val_gradients.clone(), tokens[n:])
        joint = tokens, val_gradients, split, vocabulary
        if head is None:
            at_tokens, direction = _direction_at(*joint, site.keep)
        elif split.m > 0:
            at_tokens, direction = _direction_at(*joint, None)
            at_tokens += head.gathered
            if site.keep is not None:  # the head's direction becomes that of the whole weight
                whole_direction = site.keep.kept[site.keep.name][0]  # (V, d)
                whole_direction.index_add_(0, tokens[n:].flatten(), val_gradients.flatten(0, 1))
        else:
            at_tokens = head.gathered  # gathered from the whole weight's direction
        if split.positions:
            dots = add_uses(torch.einsum("nld,nld->nl", gradients[:n], at_tokens[0]), split.positions)
        else:
            dots = torch.einsum("nld,knld->nk", gradients[:n], at_tokens)
        if head is not None and split.m > 0:
            of_head = head.picked.dots(direction)
            dots = dots + (add_uses(of_head, split.positions) if split.positions else of_head)
        return total, dots

    def head(self, site: Site, left: Tensor, right: Tensor, tokens: Tensor) -> tuple[HeadPart, Tensor]:
        """Contract an output layer whose weight is also looked up.

        Args:
            left, right: (n+m, T, V) and (n+m, T, d).
            tokens: (n+m, L), of the lookups.

        Returns:
            Its part for the lookups, and its own dots (n, k).
        """
        n = self.split.n
        total, dots = self.matrix(site, left, right)
        picked = picking(self.split, total, tokens[n:].numel(), left.shape[1])
        picked.add(left[:n, :, tokens[n:].flatten()], right[:n], (slice(None), slice(None)))
        if site.keep is not None:
            return HeadPart(total, site.keep.kept[site.keep.name][:, tokens[:n]], picked), dots
        gathered = gather(left[n:], right[n:], tokens[:n], self.split)
        if site.preconditioner is not None:
            gathered = site.preconditioner.apply(gathered, tokens[:n])
        return HeadPart(total, gathered, picked), dots


def gather(left: Tensor, right: Tensor, tokens: Tensor, split: Split) -> Tensor:
    """Return the validation gradient's rows at tokens (n, L), without computing the other rows.

    Args:
        left, right: (m, T, V) and (m, T, d), of the validation rows.

    Returns:
        (k, n, L, d).
    """
    rows = direction_of(left[:, :, tokens.flatten()], right, split)  # (k, n·L, d)
    return rows.view(-1, *tokens.shape, right.shape[2])


def _direction_at(
    tokens: Tensor, val_gradients: Tensor, split: Split, vocabulary: int, keep: Keep | None
) -> tuple[Tensor, Tensor]:
    """Return the direction of a lookup, at the train rows' tokens and by slot.

    Args:
        tokens: (n+m, L).
        val_gradients: (m, L, d).

    Returns:
        (k, n, L, d) at the train rows' tokens, and (k, U, d) by slot.
    """
    n = split.n

    def make() -> tuple[Tensor, Tensor]:
        return _validation_gradient(tokens[n:], val_gradients, split, vocabulary)

    kept: Tensor | tuple[Tensor, Tensor] = make() if keep is None else keep.direction(make)
    if isinstance(kept, Tensor):  # a direction that was given, whole
        return kept[:, tokens[:n]], kept
    direction, slots = kept
    seen = slots[tokens[:n]]  # (n, L), -1 where no validation row has the token
    return direction[:, seen.clamp(min=0)] * (seen >= 0)[..., None], direction


def _validation_gradient(
    tokens: Tensor, gradients: Tensor, split: Split, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Return the validation gradient of a lookup by slot, and the slot of each token.

    A token's slot is the last of the m·L positions at which it stands, or -1 if it stands at none. The
    gradient is zero at all other positions. So every shape is known beforehand, and the device need not be
    waited for.

    Args:
        tokens, gradients: (m, L) and (m, L, d), of the validation rows.

    Returns:
        The gradient (k, m·L, d), and the slots (vocabulary,).
    """
    m, length, d = gradients.shape
    places = torch.arange(m * length, device=tokens.device)
    slots = places.new_full((vocabulary,), -1).scatter_reduce_(0, tokens.flatten(), places, "amax")
    direction = gradients.new_zeros(split.directions, m * length, d)
    index = slots[tokens]  # (m, L)
    if split.pairwise:
        index = index + places[:m, None] * (m * length)
    direction.view(-1, d).index_add_(0, index.flatten(), gradients.flatten(0, 1))
    return direction, slots
