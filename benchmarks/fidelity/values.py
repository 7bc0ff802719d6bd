"""A training on numbered rows, and what each method says of the rows of its steps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.fidelity.states import (
    N,
    Rows,
    Setting,
    clip,
    new_model,
    new_optimizer,
    set_rate,
    validation_gradient,
)
from ghostEngines import GradDotProdEngine

Numbers = npt.NDArray[np.int64]
Values = dict[str, npt.NDArray[np.float64]]  # by method, one number a row
METHODS = {"in_pass": "in pass", "exact": "exact", "plain": "plain dot products"}


def dot_products(
    engine: GradDotProdEngine, model: torch.nn.Module, rows: Rows, direction: Mapping[str, Tensor]
) -> Tensor:
    """Return the rows' dot products with a direction (n,); `.grad` is then the gradient of their mean loss."""
    engine.use_direction(direction)
    model.zero_grad()
    engine.joint_loss(model(*rows)).backward()
    engine.prepare_gradients()
    return engine.dot_products()


def order(count: int, epochs: int, seed: int) -> Numbers:
    """Return the numbers of the rows in each step (steps, N): each row once an epoch, in random order."""
    draw = np.random.default_rng(seed)
    return np.concatenate([draw.permutation(count).reshape(-1, N) for _ in range(epochs)])


@dataclass
class Training:
    """A model and its optimizer after t steps, in float32."""

    setting: Setting
    model: Any  # CausalLM
    optimizer: torch.optim.Optimizer
    t: int = 0

    @classmethod
    def new(cls, setting: Setting) -> "Training":
        model = new_model(setting)
        return cls(setting, model, new_optimizer(model, setting))

    def copy(self) -> "Training":
        return deepcopy(self)  # at once, so that the copied optimizer has the copied parameters

    def step(self, rows: Rows) -> None:
        """Make a step in which each row weighs 1/N: fewer rows than N are as N rows of which some weigh 0."""
        self._begin()
        if len(rows[0]):  # else gradients stay zero, and momentum and decay alone move the parameters
            (self.model(*rows).sum() / N).backward()
        clip(self.model, self.setting.clip)
        self._end()

    def scored_step(self, rows: Rows, validation: Rows) -> Values:
        """Make the same step with N rows and return each method's values of the rows (N,), in nats.

        Their losses at this step (nats per token) are there too, as "loss".
        """
        self._begin()
        direction = validation_gradient(self.model, self.optimizer, validation, "current")
        with GradDotProdEngine(self.model, len(validation[0]), guard=False) as engine:
            plain = dot_products(engine, self.model, rows, direction)
        engine = GradDotProdEngine(self.model, len(validation[0]), direction="auto", guard=False)
        engine.attach(self.optimizer)
        # AdamW has no moments before its first step: no values in pass there, which is as if they were zero.
        in_pass = dot_products(engine, self.model, rows, direction).nan_to_num(0.0)
        factor = clip(self.model, self.setting.clip)
        exact = engine.exact_values(
            [partial(self.model, *rows)],
            partial(self.model, *validation),
            clip_factor=factor,
            global_rows=N,
        )
        scale = engine.lr * factor / N
        engine.detach()
        with torch.no_grad():
            losses = self.model(*rows)
        self._end()
        found = {
            "in_pass": in_pass * scale,
            "exact": exact.values[0],
            "plain": plain * scale,
            "loss": losses,
        }
        return {name: each.double().numpy() for name, each in found.items()}

    def _begin(self) -> None:
        self.t += 1
        set_rate(self.optimizer, self.setting, self.t)

    def _end(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def loss(self, rows: Rows) -> float:
        """Return the rows' mean loss, in nats per token."""
        with torch.no_grad():
            return float(self.model(*rows).mean())


def take(rows: Rows, numbers: Numbers | Sequence[int]) -> Rows:
    """Return some rows by their numbers."""
    chosen = torch.as_tensor(np.asarray(numbers, np.int64))
    return rows[0][chosen], rows[1][chosen]
