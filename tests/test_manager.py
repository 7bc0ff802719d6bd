"""The manager's own checks, in a loop that is not training_loop.py."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME
from torch import nn

from ghostEngines.engine_manager import GradDotProdManager
from ghostEngines.scoring import Scoring
from score_store.writer import ScoredStep


class Recorder:
    """In the place of a ScoreWriter."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, of_step: ScoredStep, **columns: Any) -> None:
        self.rows.append(vars(of_step) | columns)

    def flush(self) -> None:
        pass


def manager_of(
    optimizer_of: Any, direction: str, rows: int = 2, **scoring: Any
) -> tuple[Recorder, GradDotProdManager]:
    """A manager whose pass over `rows` train rows is over."""
    case = BY_NAME["fused-gpt2-untied"]
    model = case.model()
    optimizer = optimizer_of(model)
    x, y = case.data(rows + 2)
    recorder: Any = Recorder()
    manager = GradDotProdManager(
        model,
        optimizer,
        validation=(x[rows:], y[rows:]),
        scores=recorder,
        scoring=Scoring(**scoring),
        direction=direction,
    )
    manager.begin_step(0)
    ids = np.arange(rows)
    manager.attach_train_batch((x[:rows], y[:rows]), sample_ids=ids, domains=["a"] * rows, blocks=ids)
    losses = model(*manager.prepare_forward_input())
    manager.joint_loss(losses).backward()
    manager.prepare_gradients(losses)
    return recorder, manager


def test_parts_by_target_need_exact_values() -> None:
    with pytest.raises(ValueError, match="give every_exact=True"):
        Scoring(by_target=True, audit_interval=3)


def log_step(manager: GradDotProdManager, lr: float, step: int = 0) -> None:
    rows = len(manager.rows.sample_ids)
    manager.aggregate_and_log(
        step=step, lr=lr, clip_factor=torch.ones(()), skipped=torch.tensor(False), global_batch_size=rows
    )


def two_rates(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}])


@pytest.mark.parametrize("direction", ["auto", "gradient"])
def test_the_learning_rate_is_the_optimizer_s(direction: str) -> None:
    _, manager = manager_of(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), direction)
    with pytest.raises(ValueError, match=r"got lr=0.2, and dot products are relative .* 0.1: give"):
        log_step(manager, 0.2)
    log_step(manager, 0.1 * (1 + 1e-8))  # a number that was float32 on its way


def test_plain_dot_products_need_one_learning_rate() -> None:
    _, manager = manager_of(two_rates, "gradient")
    with pytest.raises(ValueError, match=r"have the learning rates 0.1, 0.2: .* use \"auto\""):
        log_step(manager, 0.2)
    _, manager = manager_of(two_rates, "auto")
    log_step(manager, 0.2)


def test_later_audits_leave_rows_out() -> None:
    """Of each micro-batch four are enough; the first audits have all."""
    found = {}
    for step in (1, 98, 99):
        recorder, manager = manager_of(
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1), "auto", rows=6, audit_interval=100
        )
        log_step(manager, 0.1, step)
        found[step] = recorder.rows[0]["exact"]
    assert found[98] is None
    assert found[1].values.isfinite().all() and len(found[1].values) == 6
    assert found[99].values[:4].equal(found[1].values[:4]) and found[99].values[4:].isnan().all()
    assert found[99].of_batch == found[1].of_batch == pytest.approx(found[1].values.sum().item())
