"""What is done with the descriptions of rules: DotProducts makes training gradients and dot products of them."""

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
from .preconditioner import Preconditioner
from .strategies import STRATEGIES, Strategy, choose_strategy


@dataclass(frozen=True)
class Site:
    """One parameter in one pass, as a sink sees it.

    shape: of the parameter. keep: where its direction is kept for other micro-batches, None for a single
    batch. preconditioner: what its direction is multiplied by, None for nothing.
    """

    shape: torch.Size
    keep: Keep | None = None
    preconditioner: Preconditioner | None = None


Taken = tuple[Tensor, Tensor]
"""The gradient of the train rows, of the parameter's shape, and dots (n, k)."""


@dataclass(frozen=True)
class HeadPart:
    """What an output layer gives to the lookups that share its weight (V, d).

    With the weight's gradient E from the lookups and H from the head, <E_i + H_i, E_v + H_v> has two cross
    terms: <E_i, H_v> = Σ_t g_it · H_v[x_it] and <H_i, E_v> = Σ_u H_i[u] · E_v[u].
    """

    total: Tensor  # (V, d): Σ_i H_i, to which the lookups add their few rows in place
    gathered: Tensor  # (k, n, L, d): H_v at the train rows' tokens, preconditioned
    picked: Tensor | None  # (n, U, d): H_i at the validation rows' tokens; None without validation rows


@dataclass(frozen=True)
class DotProducts:
    """The sink of method GradDotProd: <G_i, D> for all train rows, with D the validation gradient.

    strategy: the one that every matrix must use, None for a choice by shape. by_direction: the direction
    itself is needed, for other micro-batches or to precondition it.
    """

    split: Split
    scratch: Scratch
    strategy: str | None = None
    by_direction: bool = False

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
        """Contract left (n+m, T, p) and right (n+m, T, d): the gradient (p, d) and dots."""
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
            against = Whole(site.keep.direction(against.whole))
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
        return train.sum(0), train.reshape(self.split.n, -1) @ direction.reshape(len(direction), -1).mT

    def streamed(self, site: Site, description: Streamed) -> Taken:
        """Contract gradients that come one sample at a time: the validation rows' first."""
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
        """Contract several parameters whose gradients come together, one sample at a time: `gradients(i)`.

        Returns the training gradients and the sum of the dots (n, k).
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
        """(k, *shape) for each parameter."""
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
        """Contract lookups, with what an output layer of the same weight has left for them."""
        split, n, vocabulary = self.split, self.split.n, site.shape[0]
        tokens, gradients = lookups.flat()  # (n+m, L), (n+m, L, d)
        gradients = gradients.to(accumulation_dtype(gradients.dtype))
        if lookups.ignored is not None:
            gradients = gradients.masked_fill((tokens == lookups.ignored)[..., None], 0)
        total = gradients.new_zeros(site.shape) if head is None else head.total
        total.index_add_(0, tokens[:n].flatten(), gradients[:n].flatten(0, 1))
        val_gradients = gradients[n:]
        if site.preconditioner is not None:  # of which only the direction is made
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
            at_tokens = head.gathered  # from that direction
        dots = torch.einsum("nld,knld->nk", gradients[:n], at_tokens)
        if head is not None and head.picked is not None and split.m > 0:
            dots = dots + head.picked.flatten(1) @ direction.flatten(1).mT
        return total, dots

    def head(self, site: Site, left: Tensor, right: Tensor, tokens: Tensor) -> tuple[HeadPart, Tensor]:
        """Contract an output layer whose weight is also looked up, at tokens (n+m, L).

        left (n+m, T, V), right (n+m, T, d). Returns its part for the lookups, and its own dots.
        """
        n = self.split.n
        total, dots = self.matrix(site, left, right)
        picked = (left[:n, :, tokens[n:].flatten()].mT @ right[:n]).to(accumulation_dtype(left.dtype))
        if site.keep is not None:
            return HeadPart(total, site.keep.kept[site.keep.name][:, tokens[:n]], picked), dots
        gathered = gather(left[n:], right[n:], tokens[:n], self.split)
        if site.preconditioner is not None:
            gathered = site.preconditioner.apply(gathered, tokens[:n])
        return HeadPart(total, gathered, picked), dots


def gather(left: Tensor, right: Tensor, tokens: Tensor, split: Split) -> Tensor:
    """Return rows of the validation gradient at tokens (n, L), without making the whole of it.

    left (m, T, V), right (m, T, d): the validation rows. Returns (k, n, L, d).
    """
    rows = direction_of(left[:, :, tokens.flatten()], right, split)  # (k, n·L, d)
    return rows.view(-1, *tokens.shape, right.shape[2])


def _direction_at(
    tokens: Tensor, val_gradients: Tensor, split: Split, vocabulary: int, keep: Keep | None
) -> tuple[Tensor, Tensor]:
    """tokens (n+m, L), val_gradients (m, L, d) -> the direction at the train rows' tokens (k, n, L, d), and
    by slot (k, U, d)."""
    n = split.n

    def make() -> tuple[Tensor, Tensor]:
        return _validation_gradient(tokens[n:], val_gradients, split, vocabulary)

    direction, slots = make() if keep is None else keep.direction(make)
    seen = slots[tokens[:n]]  # (n, L), -1 where no validation row has the token
    return direction[:, seen.clamp(min=0)] * (seen >= 0)[..., None], direction


def _validation_gradient(
    tokens: Tensor, gradients: Tensor, split: Split, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """tokens (m, L), gradients (m, L, d) -> the validation gradient (k, m·L, d) by slot, and the slots
    (vocabulary,).

    A token's slot is the last of the m·L positions at which it stands, -1 for a token of no validation row;
    the direction is zero at all other positions. So every shape is known beforehand and no device has to be
    waited for."""
    m, length, d = gradients.shape
    places = torch.arange(m * length, device=tokens.device)
    slots = places.new_full((vocabulary,), -1).scatter_reduce_(0, tokens.flatten(), places, "amax")
    direction = gradients.new_zeros(split.directions, m * length, d)
    index = slots[tokens]  # (m, L)
    if split.pairwise:
        index = index + places[:m, None] * (m * length)
    direction.view(-1, d).index_add_(0, index.flatten(), gradients.flatten(0, 1))
    return direction, slots
