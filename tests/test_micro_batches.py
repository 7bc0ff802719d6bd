"""Several micro-batches in one optimizer step: gradients and scores are those of the one large batch."""

from typing import Any

import pytest
import torch
from cases import CASES, Case, call_with_targets, copy_in
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ghostEngines import GradDotProdEngine, per_sample_losses
from models.causal_lm import CausalLM

N, MICRO = 2, 3  # train rows of a micro-batch, micro-batches
SMALL = [case for case in CASES if "gpt2" in case.name or case.rules]


def run(
    model: nn.Module, case: Case, m: int, factor: float = 1.0, steps: int = 1, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Dot products of all micro-batches of the last step, (N·MICRO, ...), and its losses per micro-batch."""
    engine = GradDotProdEngine(model, m, micro_batches=MICRO, **options)
    engine.attach(loss_scale=factor)
    for step in range(steps):
        model.zero_grad()
        x, y = case.data(N * MICRO + m, seed=1 + steps - 1 - step)
        dots, all_losses = [], []
        for micro in range(MICRO):
            rows = list(range(N * micro, N * (micro + 1)))
            if micro == 0:
                rows += range(N * MICRO, N * MICRO + m)
            losses = case.losses(model, x[rows], y[rows])
            (factor * engine.joint_loss(losses)).backward()
            engine.prepare_gradients()
            dots.append(engine.dot_products())
            all_losses.append(losses.detach())
    engine.detach()
    return torch.cat(dots), all_losses


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_as_exact_as_one_batch(case: Case, m: int) -> None:
    truth, model = case.truth(N * MICRO, m), case.model()
    dots, losses = run(model, case, m)
    assert torch.allclose(losses[0], truth.losses[[*range(N), *range(N * MICRO, N * MICRO + m)]], rtol=1e-12)
    assert truth.dot_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("strategy", ["project", "instantiate"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_strategies_and_steps_in_a_row(case: Case, strategy: str) -> None:
    """The directions of the step before are gone, and a factor on the loss cancels."""
    truth, model = case.truth(N * MICRO, 2), case.model()
    dots, _ = run(model, case, 2, factor=64.0, steps=2, strategy=strategy)
    assert truth.dot_error(dots) < 1e-10
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad / 64
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("name", ["gpt2-tied", "gpt2-untied", "fused-gpt2-tied-padded", "fused-gpt2-untied"])
def test_per_layer(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    truth, model = case.truth(N * MICRO, 2), case.model()
    engine = GradDotProdEngine(model, 2, micro_batches=MICRO, granularity="per_layer")
    if "untied" not in name:
        with pytest.raises(ValueError, match="tied weights"):
            engine.attach()
        return
    engine.attach()
    names = engine.layer_names
    engine.detach()
    dots, _ = run(model, case, 2, granularity="per_layer")
    assert truth.dot_error(dots.sum(1)) < 1e-10
    for column, layer in enumerate(names):
        assert truth.part([layer]).dot_error(dots[:, column]) < 1e-10


@pytest.mark.parametrize("name", ["gpt2-tied", "fused-gpt2-tied-padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    dots, _ = run(copy_in(case.model(), dtype), case, 2)
    assert dots.dtype == torch.float32
    assert case.truth(N * MICRO, 2).dot_error(dots) < (1e-5 if dtype == torch.float32 else 0.05)


def test_the_direction_is_let_go_after_the_last_micro_batch() -> None:
    case = next(case for case in CASES if case.name == "fused-gpt2-tied")
    model = case.model()
    assert isinstance(model, CausalLM)
    engine = GradDotProdEngine(model, 1, micro_batches=2)
    engine.attach()
    x, y = case.data(3)
    parameters = len(list(model.parameters()))
    for rows in ([0, 2], [1]):
        loss = engine.joint_loss(call_with_targets(model, x[rows], y[rows]))
        loss.backward()
        memory = [
            StorageWeakRef(kept.untyped_storage())
            for kept in engine._micro_batches.kept.values()
            if isinstance(kept, Tensor)
        ]
        assert len(engine._micro_batches.kept) == parameters and len(memory) >= parameters - 1
        engine.prepare_gradients()
    assert all(reference.expired() for reference in memory)  # though the graph of the loss is there
    assert loss.grad_fn is not None


def test_what_needs_the_validation_rows_in_every_pass_is_refused() -> None:
    model = nn.Linear(2, 2)
    refused: list[dict[str, Any]] = [{"granularity": "pairwise"}, {"strategy": "gram"}]
    for options in refused:
        with pytest.raises(ValueError, match="micro-batches"):
            GradDotProdEngine(model, 1, micro_batches=2, **options)
    with pytest.raises(ValueError, match="micro_batches must be at least 1"):
        GradDotProdEngine(model, 1, micro_batches=0)


def test_another_number_of_rows_is_refused() -> None:
    case = next(case for case in CASES if case.name == "gpt2-tied")
    model = case.model()
    engine = GradDotProdEngine(model, 1, micro_batches=2)
    engine.attach()
    x, y = case.data(5)
    engine.joint_loss(per_sample_losses(model, x[:3], y[:3])).backward()
    engine.prepare_gradients()
    with pytest.raises(
        ValueError, match="a micro-batch of 3 rows, where the first of its update had 2 train rows"
    ):
        engine.joint_loss(per_sample_losses(model, x[:3], y[:3]))
    engine.joint_loss(per_sample_losses(model, x[3:], y[3:])).backward()  # and the right one goes on
    engine.prepare_gradients()


def test_a_layer_that_runs_in_a_later_micro_batch_only_is_an_error() -> None:
    """The first one's validation rows would have made its direction."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.late, self.runs = nn.Linear(2, 2), nn.Linear(2, 2), False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.always(x)
            return self.late(hidden) if self.runs else hidden

    model = Late()
    with GradDotProdEngine(model, 1, micro_batches=2) as engine:
        engine.joint_loss(model(torch.ones(3, 2)).sum(1)).backward()
        engine.prepare_gradients()
        model.runs = True
        loss = engine.joint_loss(model(torch.ones(2, 2)).sum(1))
        with pytest.raises(RuntimeError, match=r"'late.weight' has a gradient and no direction"):
            loss.backward()
