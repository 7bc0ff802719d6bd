"""The gradient of the fused head's weight, gathered part by part, with the train rows' dot products."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contraction import (
    Split,
    Strategy,
    Tile,
    accumulation_dtype,
    add_gradient,
    gram,
    instantiate,
    precondition_tiles,
    project,
)
from ..memory import Keep, Scratch
from ..preconditioner import Preconditioner
from ..step import TiedRoute
from .linear import gather


@dataclass(frozen=True)
class HeadPlan:
    """How the head divides its rows and contracts its gradients under an engine."""

    split: Split
    strategy: Strategy
    probe: Tensor
    route: TiedRoute | None
    scratch: Scratch
    keep: Keep | None
    preconditioner: Preconditioner | None


Part = tuple[slice, slice]  # rows and positions: tensor[part] is (g, t, ...)


class Sink:
    """Gathers the gradient of the head's weight, part by part, validation rows first.

    Everything in here lacks the factor row_weight / fewest targets, which `finish` applies.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total  # (V, d), of which nothing counts before the first train rows are in
        self.fresh = True

    @staticmethod
    def make(weight: Tensor, dtype: torch.dtype, plan: HeadPlan | None) -> "Sink":
        total = torch.empty_like(weight, dtype=dtype)
        return Sink(total) if plan is None else AttributingSink(total, plan)

    def add(self, residuals: Tensor, rows: Tensor, part: Part) -> None:
        """residuals (g, t, V), rows (g, t, d)"""
        add_gradient(residuals, rows, self.total, self.fresh)
        self.fresh = False

    def seal(self) -> None:
        """All parts are in: let go of what the backward pass does not need."""

    def finish(self, train_scale: Tensor, val_scale: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight, probe, gathered, picked and whole."""
        return self.total.mul_(train_scale), None, None, None, None


class AttributingSink(Sink):
    """The same for the train rows, with the dot products and what a tied embedding needs."""

    def __init__(self, total: Tensor, plan: HeadPlan) -> None:
        super().__init__(total)
        self.split, self.route, self.keep = plan.split, plan.route, plan.keep
        self.dots = total.new_zeros(plan.split.n, plan.split.directions)
        self.validation: ValidationGradient | ValidationRows
        self.validation = (
            ValidationRows(plan.split) if plan.strategy == "gram" else ValidationGradient(total, plan)
        )
        if plan.route is not None:
            self.picked = total.new_zeros(plan.route.picked.shape)

    def add(self, residuals: Tensor, rows: Tensor, part: Part) -> None:
        n, (group, _) = self.split.n, part
        if group.start >= n:
            self.validation.add(residuals, rows, slice(group.start - n, group.stop - n))
            return
        self.dots[group] += self.validation.contract(residuals, rows, self.total, self.fresh)
        self.fresh = False
        if self.route is not None:
            self.picked[group] += residuals[:, :, self.route.val_tokens].mT @ rows

    def seal(self) -> None:
        if self.route is not None:
            self.gathered = self.validation.gather(self.route.train_tokens)
        if self.keep is None:
            del self.validation

    def finish(self, train_scale: Tensor, val_scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, *_ = super().finish(train_scale, val_scale)
        if self.keep is not None:
            assert isinstance(self.validation, ValidationGradient)
            direction = self.validation.direction
            if self.keep.first:
                self.keep.direction(lambda: direction.mul_(val_scale))
            else:
                val_scale = torch.ones_like(val_scale)  # the direction has it already
        dots = self.dots.mul_(train_scale * val_scale)
        if self.route is None:
            return grad_weight, dots, None, None, None
        return None, dots, self.gathered.mul_(val_scale), self.picked.mul_(train_scale), grad_weight


class ValidationGradient:
    """What train rows are contracted with, for strategies that need it: the direction (k, V, d)."""

    def __init__(self, total: Tensor, plan: HeadPlan) -> None:
        self.split, self.strategy, self.scratch = plan.split, plan.strategy, plan.scratch
        self.preconditioner = plan.preconditioner if plan.split.m > 0 else None  # None: nothing left to do
        if plan.keep is None or plan.keep.first:
            self.direction = total.new_empty(plan.split.directions, *total.shape)
        else:
            self.direction = plan.keep.kept[plan.keep.name]
        self.fresh = [True] * plan.split.directions

    def add(self, residuals: Tensor, rows: Tensor, group: slice) -> None:
        if not self.split.pairwise:
            self._add(residuals, rows, 0)
            return
        for i, j in enumerate(range(group.start, group.stop)):
            self._add(residuals[i : i + 1], rows[i : i + 1], j)

    def _add(self, residuals: Tensor, rows: Tensor, j: int) -> None:
        add_gradient(residuals, rows, self.direction[j], self.fresh[j])
        self.fresh[j] = False

    def contract(self, residuals: Tensor, rows: Tensor, total: Tensor, fresh: bool) -> Tensor:
        precondition_tiles(self.direction, self.preconditioner, self.scratch)  # all validation rows are in
        self.preconditioner = None
        if self.strategy == "project":
            return project(residuals, rows, self.direction, total, fresh)
        k = self.split.directions
        return instantiate(residuals, rows, self._directions, k, total, fresh, self.scratch)

    def _directions(self, tile: Tile) -> Tensor:
        return self.direction[:, tile[0], tile[1]]

    def gather(self, tokens: Tensor) -> Tensor:
        return self.direction[:, tokens]


class ValidationRows:
    """The same for gram, which needs the validation rows themselves: of each part its rows' numbers,
    residuals (g, t, V) and rows (g, t, d)."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.parts: list[tuple[slice, Tensor, Tensor]] = []

    def add(self, residuals: Tensor, rows: Tensor, group: slice) -> None:
        self.parts.append((group if self.split.pairwise else slice(None), residuals.clone(), rows))

    def contract(self, residuals: Tensor, rows: Tensor, total: Tensor, fresh: bool) -> Tensor:
        add_gradient(residuals, rows, total, fresh)
        dots = total.new_zeros(len(rows), self.split.directions)
        for group, val_residuals, val_rows in self.parts:
            dots[:, group] += gram(residuals, rows, val_residuals, val_rows, self.split.pairwise)
        return dots

    def gather(self, tokens: Tensor) -> Tensor:
        shape = (self.split.directions, *tokens.shape, self.parts[0][2].shape[2])
        gathered = self.parts[0][2].new_zeros(shape, dtype=accumulation_dtype(self.parts[0][2].dtype))
        for group, residuals, rows in self.parts:
            gathered[group] += gather(residuals, rows, tokens, self.split)
        return gathered
