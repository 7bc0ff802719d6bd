"""A model before a step of its optimizer, with the step's gradients: what exact values are computed from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import BY_NAME, Case
from torch import Tensor, nn

from benchmarks.oracle import Truth, per_sample
from ghostEngines import ExactValues, GradDotProdEngine

N, M, LR, WARM = 4, 2, 1e-2, 3
ADAM: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}


@dataclass
class State:
    """A model before a step, whose gradients are there, clipped."""

    case: Case
    model: Any
    optimizer: torch.optim.Optimizer
    engine: GradDotProdEngine
    clip_factor: float
    truth: Truth  # of the step's rows, at the parameters before it
    x: Tensor
    y: Tensor

    def losses(self, rows: slice) -> Callable[[], Tensor]:
        return lambda: self.case.losses(self.model, self.x[rows], self.y[rows])

    def exact(self) -> ExactValues:
        return self.engine.exact_values(
            [self.losses(slice(0, N))],
            self.losses(slice(N, None)),
            clip_factor=self.clip_factor,
            global_rows=N,
        )

    def flat(self, what: Callable[[nn.Parameter], Tensor]) -> Tensor:
        return torch.cat([what(p).detach().flatten() for p in self.model.parameters() if p.requires_grad])

    def state(self, key: str) -> Tensor:
        return self.flat(lambda p: self.optimizer.state[p].get(key, torch.zeros_like(p)))


def prepared(name: str, make: Callable[..., Any], clip: float = 0.0, warm: int = WARM) -> State:
    """A model after `warm` updates, before the next. clip: the norm of the gradient is clipped to this much of it."""
    case = BY_NAME[name]
    model = case.model()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    engine = GradDotProdEngine(model, M, direction="gradient")
    engine.attach(optimizer)
    for step in range(warm + 1):
        x, y = case.data(N + M, seed=1 + step)
        if step == warm:
            twin = case.model()
            twin.load_state_dict(model.state_dict())
            truth = per_sample(twin, case.logits, x, y, N)
        engine.joint_loss(case.losses(model, x, y)).backward()
        engine.prepare_gradients()
        if step < warm:
            optimizer.step()
            optimizer.zero_grad()
    factor = clip or 1.0
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor
    return State(case, model, optimizer, engine, factor, truth, x, y)
