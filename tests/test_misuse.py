"""Calls of a step in a wrong order, and a model that changes while attached: exact, or an error."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from cases import BY_NAME, D, T, V, gradient_of
from torch import Tensor, nn

from benchmarks.oracle import Truth
from ghostEngines import GradDotProdEngine

LOUD = (RuntimeError, ValueError)


# The order of forward, joint_loss, backward and prepare_gradients


Run = Callable[[int], Tensor]


def started(name: str = "gpt2-tied") -> tuple[GradDotProdEngine, Any, Run, Truth]:
    """An attached engine (3 train, 2 validation rows), its model, data seed -> losses, and the truth for
    data seed 1."""
    case = BY_NAME[name]
    model = case.model()
    engine = GradDotProdEngine(model, val_batch_size=2)
    engine.attach()
    return engine, model, lambda seed: case.losses(model, *case.data(5, seed)), case.truth(3, 2)


def end(engine: GradDotProdEngine, loss: Tensor) -> None:
    """What follows the loss in a step."""
    loss.backward()
    engine.prepare_gradients()


def finish(engine: GradDotProdEngine, model: nn.Module, losses: Tensor, truth: Truth) -> None:
    """The rest of a step, which must be exact."""
    model.zero_grad()
    end(engine, engine.joint_loss(losses))
    assert truth.dot_error(engine.dot_products()) < 1e-10
    assert truth.gradient_error(model) < 1e-10


def test_every_step_has_its_turn() -> None:
    engine, _, run, truth = started()
    for early in (engine.prepare_gradients, engine.dot_products, lambda: engine.joint_loss(torch.zeros(5))):
        with pytest.raises(RuntimeError):
            early()
    losses = run(1)
    for early in (engine.prepare_gradients, engine.dot_products):
        with pytest.raises(RuntimeError, match=r"joint_loss|prepare_gradients"):
            early()
    loss = engine.joint_loss(losses)
    with pytest.raises(RuntimeError, match="joint_loss"):
        engine.prepare_gradients()
    loss.backward()
    with pytest.raises(RuntimeError, match="prepare_gradients"):
        engine.dot_products()
    engine.prepare_gradients()
    assert truth.dot_error(engine.dot_products()) < 1e-10
    run(1)
    with pytest.raises(RuntimeError, match="prepare_gradients"):  # those of the step before are gone
        engine.dot_products()


@pytest.mark.parametrize(
    "bad", [lambda v: v[:3], lambda v: v.mean(), lambda v: v[:, None], lambda v: v.repeat(2)]
)
def test_joint_loss_takes_one_loss_per_sample(bad: Callable[[Tensor], Tensor]) -> None:
    engine, _, run, _ = started()
    with pytest.raises(ValueError, match=r"one loss per sample, \(5,\)"):
        engine.joint_loss(bad(run(1)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda engine, losses, _: losses[:3].mean(),
        lambda engine, losses, _: losses.sum(),
        lambda engine, losses, _: engine.joint_loss(losses.detach()),
        lambda engine, losses, _: engine.joint_loss(losses) + losses.sum(),
        lambda engine, losses, _: engine.joint_loss(losses) - 0.5 * losses[4],
        # Only the last forward pass has probes.
        lambda engine, losses, before: engine.joint_loss(before) + engine.joint_loss(losses),
        lambda engine, losses, before: engine.joint_loss(before),
    ],
    ids=[
        "train mean",
        "sum",
        "detached",
        "joint loss and sum",
        "joint loss and one row",
        "two forward passes",
        "an earlier forward pass",
    ],
)
def test_the_backward_pass_is_that_of_the_joint_loss(
    loss: Callable[[GradDotProdEngine, Tensor, Tensor], Tensor],
) -> None:
    """Of the last forward pass; after the error a right step is exact."""
    engine, model, run, truth = started()
    before, losses = run(2), run(1)
    combined = loss(engine, losses, before)
    with pytest.raises(LOUD, match="joint_loss"):
        end(engine, combined)
    finish(engine, model, run(1), truth)


def test_a_joint_loss_for_the_log() -> None:
    """It may be asked for more than once; what counts is what the backward pass starts from."""
    engine, model, run, truth = started()
    losses = run(1)
    logged = engine.joint_loss(losses).item()
    assert abs(logged - (losses[:3].mean() + losses[3:].mean()).item()) < 1e-12
    finish(engine, model, losses, truth)
    model.zero_grad()
    losses = run(1)
    end(engine, 0.25 * engine.joint_loss(losses) + 0.75 * engine.joint_loss(losses))
    assert truth.dot_error(engine.dot_products()) < 1e-10


def test_two_backward_passes_of_one_forward() -> None:
    """Their gradients add up, linearly in p.grad and in the dots, but the scale of the dots is a square."""
    engine, _, run, _ = started()
    loss = engine.joint_loss(run(1))
    loss.backward(retain_graph=True)
    with pytest.raises(LOUD, match="backward"):
        end(engine, loss)


def test_a_forward_pass_that_is_thrown_away() -> None:
    engine, model, run, truth = started()
    run(2)
    finish(engine, model, run(1), truth)


def test_evaluation_between_forward_and_backward() -> None:
    engine, model, run, truth = started()
    losses = run(1)
    with torch.no_grad():
        model.eval()
        assert torch.equal(run(1), losses)
        model(torch.zeros(1, T, dtype=torch.long))  # any number of rows
        model.train()
    finish(engine, model, losses, truth)


def test_an_exception_in_forward_then_another_step() -> None:
    engine, model, run, truth = started()
    with pytest.raises(IndexError):
        model(torch.full((5, T), V))
    finish(engine, model, run(1), truth)


def test_a_layer_called_outside_of_the_model() -> None:
    """Its gradients would be among the probe's, uncounted; before the first step as after one."""
    engine, model, run, _ = started()
    hidden = torch.randn(5, T, D, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="ran outside of the model"):
        model.transformer.h[0](hidden)
    end(engine, engine.joint_loss(run(1)))
    with pytest.raises(RuntimeError, match="ran outside of the model"):
        model.transformer.h[0](hidden)


def test_a_second_derivative_raises() -> None:
    """It would be the train rows' for some terms and all rows' for others."""
    engine, model, run, _ = started("linear-3d")

    def penalised() -> None:
        engine.joint_loss(run(1)).backward(create_graph=True)
        torch.stack([gradient_of(p).square().sum() for p in model.parameters()]).sum().backward()

    with pytest.warns(UserWarning, match="create_graph"), pytest.raises(LOUD):
        penalised()


# A model that changes while attached


def test_parameters_that_are_unfrozen_while_attached() -> None:
    """No rule stands in their layer, so their gradient is of the validation rows as well."""
    engine, model, run, _ = started()
    engine.detach()
    model.transformer.h[0].requires_grad_(False)
    engine.attach()
    model.transformer.h[0].requires_grad_(True)
    with pytest.raises(LOUD, match=r"transformer\.h\.0"):
        end(engine, engine.joint_loss(run(1)))


def test_parameters_that_are_frozen_while_attached() -> None:
    engine, model, run, _ = started()
    for p in (*model.transformer.h[0].parameters(), model.transformer.ln_f.bias):
        p.requires_grad_(False)
    engine.detach()
    truth = BY_NAME["gpt2-tied"].truth(3, 2, model=deepcopy(model))
    engine.attach()
    finish(engine, model, run(1), truth)


def test_weights_that_are_tied_while_attached() -> None:
    """Nobody has laid the route for the cross terms of their gradients."""
    engine, model, run, _ = started("gpt2-untied")
    model.lm_head.weight = model.transformer.wte.weight
    with pytest.raises(LOUD, match="lm_head"):
        end(engine, engine.joint_loss(run(1)))


@pytest.mark.parametrize("copy", [deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("after_a_step", [False, True])
def test_a_copy_of_an_attached_model_is_refused(
    copy: Callable[[nn.Module], object], after_a_step: bool
) -> None:
    """It would carry an engine of its own, which nobody could detach."""
    engine, model, run, truth = started()
    if after_a_step:
        finish(engine, model, run(1), truth)
    with pytest.raises(LOUD, match="detach"):
        copy(model)
    engine.detach()
    copy(model)
