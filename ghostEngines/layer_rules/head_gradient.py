"""The gradient of the fused head's weight and the train rows' dot products, summed part by part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contraction import Split, Whole, accumulation_dtype, add_gradient, precondition_tiles
from ..picked import picking
from ..sinks import DotProducts, HeadPart, Site, gather
from ..strategies import STRATEGIES, Strategy
from ..uses import Shared, Uses


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """How the head contracts its gradients under an engine."""

    sink: DotProducts
    strategy: str
    probe: Tensor  # (n, k), or (n, T) by position
    site: Site
    uses: Uses
    shared: Shared  # the weight's uses
    position: int  # of this use
    tokens: Tensor | None  # (n+m, L) of the lookups of the same weight; None: there are none

    @property
    def split(self) -> Split:
        return self.sink.split


Part = tuple[slice, slice]  # rows and positions: tensor[part] is (g, t, ...)


class HeadGradient:
    """Sum the gradient of the head's weight, part by part, validation rows first.

    Everything here lacks the factor largest row weight / fewest targets, which `finish` applies.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total  # (V, d), uninitialised while fresh
        self.fresh = True

    @staticmethod
    def make(weight: Tensor, dtype: torch.dtype, plan: HeadPlan | None) -> "HeadGradient":
        """Return the sum for a weight, with dot products if there is a plan."""
        total = torch.empty_like(weight, dtype=dtype)
        return HeadGradient(total) if plan is None else ScoredHeadGradient(total, plan)

    def add(self, residuals: Tensor, rows: Tensor, part: Part) -> None:
        """Add a part: residuals (g, t, V) and rows (g, t, d)."""
        add_gradient(residuals, rows, self.total, self.fresh)
        self.fresh = False

    def seal(self) -> None:
        """Drop what the backward pass does not need, after the last part."""

    def finish(self, train_scale: Tensor, val_scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the weight and of the probe."""
        return self.total.mul_(train_scale), None


class ScoredHeadGradient(HeadGradient):
    """Sum the gradient of the train rows alone, and their dot products."""

    def __init__(self, total: Tensor, plan: HeadPlan) -> None:
        super().__init__(total)
        self.plan, self.split, self.keep = plan, plan.split, plan.site.keep
        self.strategy: Strategy = STRATEGIES[plan.strategy]
        self.dots = total.new_zeros(plan.split.n, plan.split.scores)
        self.validation: ValidationGradient | ValidationRows
        self.validation = (
            ValidationGradient(total, plan) if self.strategy.by_direction else ValidationRows(plan.split)
        )
        if plan.tokens is not None:
            n, m = plan.split.n, plan.split.m
            self.val_tokens = plan.tokens[n:].flatten()
            self.picked = picking(plan.split, total, m * plan.tokens.shape[1], plan.split.positions)

    def add(self, residuals: Tensor, rows: Tensor, part: Part) -> None:
        n, (group, _) = self.split.n, part
        if group.start >= n:
            self.validation.add(residuals, rows, slice(group.start - n, group.stop - n))
            return
        self.validation.seal()
        by_position = self.split.positions > 0
        contract = self.strategy.contract_by_position if by_position else self.strategy.contract
        self.dots[part if by_position else group] += contract(
            residuals, rows, self.validation, self.total, self.fresh, self.plan.sink.scratch
        )
        self.fresh = False
        if self.plan.tokens is not None:
            self.picked.add(residuals[:, :, self.val_tokens], rows, part)

    def seal(self) -> None:
        if self.plan.tokens is not None:
            self.gathered = self.validation.gather(self.plan.tokens[: self.split.n])
        if self.keep is None:
            del self.validation

    def finish(self, train_scale: Tensor, val_scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
        total, _ = super().finish(train_scale, val_scale)
        assert total is not None
        if self.keep is not None:
            assert isinstance(self.validation, ValidationGradient)
            direction = self.validation.direction
            if self.keep.first:
                self.keep.direction(lambda: direction.mul_(val_scale))
            else:
                val_scale = torch.ones_like(val_scale)  # the kept direction includes it
        dots, plan = self.dots.mul_(train_scale * val_scale), self.plan
        if plan.tokens is None:
            return total, dots
        head = HeadPart(total, self.gathered.mul_(val_scale), self.picked.times(train_scale))
        last = plan.position == plan.shared.positions[0]
        return plan.uses.take_head(plan.sink, plan.site, plan.shared, head, dots, last)


class ValidationGradient(Whole):
    """The direction (k, V, d), for strategies that contract with it."""

    def __init__(self, total: Tensor, plan: HeadPlan) -> None:
        self.split, self.scratch, keep = plan.split, plan.sink.scratch, plan.site.keep
        # Without validation rows the direction is a kept one, which is preconditioned already.
        self.preconditioner = None
        if plan.split.m > 0 and plan.site.preconditioner is not None:
            self.preconditioner = plan.site.preconditioner.shaped(total.shape)
        if keep is None or keep.first:
            super().__init__(total.new_empty(plan.split.directions, *total.shape))
        else:
            super().__init__(keep.kept[keep.name])
        self.fresh = [True] * plan.split.directions

    def add(self, residuals: Tensor, rows: Tensor, group: slice) -> None:
        """Add a part of the validation rows in this group."""
        if not self.split.pairwise:
            self._add(residuals, rows, 0)
            return
        for i, j in enumerate(range(group.start, group.stop)):
            self._add(residuals[i : i + 1], rows[i : i + 1], j)

    def _add(self, residuals: Tensor, rows: Tensor, j: int) -> None:
        add_gradient(residuals, rows, self.direction[j], self.fresh[j])
        self.fresh[j] = False

    def seal(self) -> None:
        """Precondition the direction, after the last validation rows."""
        precondition_tiles(self.direction, self.preconditioner, self.scratch)
        self.preconditioner = None

    def gather(self, tokens: Tensor) -> Tensor:
        """Return the direction at tokens (n, L), (k, n, L, d)."""
        return self.direction[:, tokens]


class ValidationRows:
    """The validation rows themselves, for gram, in parts: residuals (g, t, V) and rows (g, t, d)."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._parts: list[tuple[slice, Tensor, Tensor]] = []

    @property
    def k(self) -> int:
        return self.split.directions

    def add(self, residuals: Tensor, rows: Tensor, group: slice) -> None:
        """Keep a part of the validation rows in this group."""
        self._parts.append((group if self.split.pairwise else slice(None), residuals.clone(), rows))

    def seal(self) -> None:
        """Do nothing: there is no direction to precondition."""

    def parts(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Return the parts: their columns in the dots, residuals and rows."""
        return self._parts

    def gather(self, tokens: Tensor) -> Tensor:
        """Return the validation gradient at tokens (n, L), (k, n, L, d)."""
        rows = self._parts[0][2]
        shape = (self.k, *tokens.shape, rows.shape[2])
        gathered = rows.new_zeros(shape, dtype=accumulation_dtype(rows.dtype))
        for group, residuals, part_rows in self._parts:
            gathered[group] += gather(residuals, part_rows, tokens, self.split)
        return gathered
