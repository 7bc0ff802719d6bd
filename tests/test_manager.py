"""The manager's own checks, in a loop that is not training_loop.py."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME
from torch import nn

from ghostEngines.engine_manager import GradDotProdManager
from ghostEngines.scoring import Scoring


class Recorder:
    """In the place of a ScoreWriter."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, **columns: Any) -> None:
        self.rows.append(columns)

    def flush(self) -> None:
        pass


def manager_of(optimizer_of: Any, direction: str) -> tuple[nn.Module, Any, GradDotProdManager]:
    case = BY_NAME["fused-gpt2-untied"]
    model = case.model()
    optimizer = optimizer_of(model)
    x, y = case.data(4)
    recorder: Any = Recorder()
    manager = GradDotProdManager(
        model,
        optimizer,
        validation=(x[2:], y[2:]),
        scores=recorder,
        scoring=Scoring(),
        direction=direction,
    )
    manager.begin_step(0)
    ids = np.arange(2)
    manager.attach_train_batch(x[:2], y[:2], sample_ids=ids, domains=["a", "b"], blocks=ids)
    losses = model(*manager.prepare_forward_input())
    manager.joint_loss(losses).backward()
    manager.prepare_gradients(losses)
    return model, optimizer, manager


def log_step(manager: GradDotProdManager, lr: float) -> None:
    manager.aggregate_and_log(
        step=0, lr=lr, clip_factor=torch.ones(()), skipped=torch.tensor(False), global_batch_size=2
    )


def two_rates(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}])


@pytest.mark.parametrize("direction", ["auto", "gradient"])
def test_the_learning_rate_is_the_optimizer_s(direction: str) -> None:
    *_, manager = manager_of(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), direction)
    with pytest.raises(ValueError, match=r"got lr=0.2, and dot products are relative .* 0.1: give"):
        log_step(manager, 0.2)
    log_step(manager, 0.1)


def test_plain_dot_products_need_one_learning_rate() -> None:
    *_, manager = manager_of(two_rates, "gradient")
    with pytest.raises(ValueError, match=r"have the learning rates 0.1, 0.2: .* use \"auto\""):
        log_step(manager, 0.2)
    *_, manager = manager_of(two_rates, "auto")
    log_step(manager, 0.2)
