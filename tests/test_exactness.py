"""Dot products and training gradients against one backward pass per sample in float64."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, copy_in, gradient_of
from torch import Tensor, nn

from benchmarks.oracle import Truth
from ghostEngines import RULES, GradDotProdEngine
from ghostEngines.strategies import STRATEGIES

NAMES = [case.name for case in CASES]
MODELS = [name for name in NAMES if "gpt2" in name]


def engine_step(
    case: Case, n: int, m: int, dtype: torch.dtype = torch.float64, factor: float = 1.0, **options: Any
) -> tuple[Tensor, nn.Module, Tensor]:
    """(dots, model with its gradients, losses) of one step with the engine."""
    model = copy_in(case.model(), dtype)
    x, y = case.data(n + m)
    x = x.to(dtype) if x.is_floating_point() else x
    with GradDotProdEngine(model, val_batch_size=m, **options) as engine:
        losses = case.losses(model, x, y)
        (engine.joint_loss(losses) * factor).backward()
        engine.prepare_gradients()
        return engine.dot_products(), model, losses.detach()


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str, n: int, m: int) -> None:
    case = BY_NAME[name]
    truth = case.truth(n, m)
    dots, model, losses = engine_step(case, n, m)
    assert torch.allclose(losses, truth.losses, rtol=1e-12, atol=0)
    assert truth.dot_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    case = BY_NAME[name]
    truth = case.truth(5, 3)
    dots, model, _ = engine_step(case, 5, 3, torch.float32)
    assert dots.dtype == torch.float32
    assert truth.dot_error(dots) < 1e-5
    assert truth.gradient_error(model) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_strategy(name: str, strategy: str) -> None:
    case = BY_NAME[name]
    truth = case.truth(5, 3)
    dots, model, _ = engine_step(case, 5, 3, strategy=strategy)
    assert truth.dot_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_pairwise(name: str, strategy: str) -> None:
    case = BY_NAME[name]
    truth = case.truth(5, 3)
    dots, model, _ = engine_step(case, 5, 3, strategy=strategy, granularity="pairwise")
    assert truth.pairwise_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_per_layer(name: str, strategy: str) -> None:
    """Each layer's column is the dot product over its own parameters; a tied weight's is the sum of two."""
    case = BY_NAME[name]
    truth = case.truth(5, 3)
    model, (x, y) = case.model(), case.data(8)
    with GradDotProdEngine(model, 3, granularity="per_layer", strategy=strategy) as engine:
        engine.joint_loss(case.losses(model, x, y)).backward()
        engine.prepare_gradients()
        dots, names = engine.dot_products(), engine.layer_names
    assert truth.dot_error(dots.sum(1)) < 1e-10
    sharing = defaultdict(list)
    for layer in names:
        sharing[model.get_submodule(layer).weight].append(layer)
    for layers in sharing.values():
        got = dots[:, [names.index(layer) for layer in layers]].sum(1)
        assert truth.part(layers).dot_error(got) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_factor_on_the_loss_scales_gradients_but_not_dots(name: str) -> None:
    """A gradient scaler's or an accumulation's factor."""
    case = BY_NAME[name]
    truth = case.truth(3, 2)
    dots, model, _ = engine_step(case, 3, 2, factor=1024.0)
    assert truth.dot_error(dots) < 1e-10
    for p in model.parameters():
        gradient_of(p).div_(1024.0)
    assert truth.gradient_error(model) < 1e-10


def test_every_rule_has_a_case() -> None:
    kinds = {kind for case in CASES for kind in case.rules}
    assert {k if k in RULES else f"{k.__module__}.{k.__qualname__}" for k in kinds} == set(RULES)


def test_the_oracle_sees_the_mistakes_of_others() -> None:
    """What published implementations compute is far outside the bounds above: a tied weight without its cross
    terms, and (Σ_j left_j)ᵀ(Σ_j right_j) for the validation gradient of several rows."""
    case = BY_NAME["gpt2-tied"]
    truth = case.truth(5, 3)
    untied = case.model()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    without_cross_terms = case.truth(5, 3, model=untied).dots()
    assert truth.dot_error(without_cross_terms) > 1e-3

    left, right = (torch.randn(8, 6, size, dtype=torch.float64) for size in (7, 9))
    gradients = left.mT @ right
    mixed = left[5:].sum(0).T @ right[5:].sum(0) / 9
    layer = Truth([{"weight": each} for each in gradients], torch.zeros(8), 5)
    assert layer.dot_error((gradients[:5] * mixed).sum((1, 2))) > 1e-2
