"""Rows with weights of their own, and updates of any number of micro-batches of any size."""

from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn

from benchmarks.oracle import Truth
from ghostEngines import GradDotProdEngine
from models.causal_lm import CausalLM

M = 2
WEIGHTS = [[0.3, 0.05], [0.2], [0.4, 0.1, 0.7]]  # by micro-batch, which are of unequal size
NAMES = ["gpt2-tied", "gpt2-untied", "fused-gpt2-tied-padded", "fused-gpt2-untied", "llama", "convolution"]
SOME = [case for case in CASES if case.name in NAMES]
TIED, PLAIN, FUSED = (next(case for case in CASES if case.name == name) for name in NAMES[:3])


def weighted_gradient_error(truth: Truth, model: nn.Module, weights: Tensor) -> float:
    """Return the largest relative error of `.grad` against Σ w_i ∇ℓ_i over all parameters."""
    want = weights.double() @ truth.vectors()[: truth.n]
    got = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    return ((got - want).norm() / want.norm()).item()


def step(
    engine: GradDotProdEngine, case: Case, model: nn.Module, weights: list[list[float]], seed: int = 1
) -> Tensor:
    """Make the passes of one update and return the dot products of all its rows."""
    sizes = [len(each) for each in weights]
    n = sum(sizes)
    x, y = case.data(n + M, seed)
    dots, first = [], 0
    for micro, each in enumerate(weights):
        rows = [*range(first, first + len(each)), *(range(n, n + M) if micro == 0 else ())]
        given = torch.tensor(each, dtype=torch.float64)
        fused = isinstance(model, CausalLM)
        if fused:
            engine.begin_pass(given)
        losses = case.losses(model, x[rows], y[rows])
        (engine.joint_loss(losses) if fused else engine.joint_loss(losses, given)).backward()
        engine.prepare_gradients()
        dots.append(engine.dot_products())
        first += len(each)
    return torch.cat(dots)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_gradients_are_weighted_and_scores_are_not(case: Case) -> None:
    model, weights = case.model(), torch.tensor([w for each in WEIGHTS for w in each], dtype=torch.float64)
    truth = case.truth(len(weights), M)
    with GradDotProdEngine(model, M) as engine:
        engine.begin_update(len(WEIGHTS))
        dots = step(engine, case, model, WEIGHTS)
        assert truth.dot_error(dots) < 1e-10
        assert weighted_gradient_error(truth, model, weights) < 1e-10
        model.zero_grad()
        dots = step(engine, case, model, [[0.25, 0.5]], seed=2)  # and then one micro-batch again
        truth = case.truth(2, M, seed=2)
        assert truth.dot_error(dots) < 1e-10
        assert weighted_gradient_error(truth, model, torch.tensor([0.25, 0.5])) < 1e-10


@pytest.mark.parametrize(
    "options", [{"granularity": "pairwise"}, {"strategy": "gram"}, {"strategy": "project"}]
)
@pytest.mark.parametrize("case", [FUSED, PLAIN], ids=lambda case: case.name)
def test_other_scores(case: Case, options: dict[str, Any]) -> None:
    model, truth = case.model(), case.truth(3, M)
    with GradDotProdEngine(model, M, **options) as engine:
        dots = step(engine, case, model, [[0.5, 0.125, 2.0]])
    assert (truth.pairwise_error if dots.dim() > 1 else truth.dot_error)(dots) < 1e-10


@pytest.mark.parametrize("case", [FUSED, PLAIN], ids=lambda case: case.name)
def test_a_row_of_weight_zero_has_no_score_and_no_gradient(case: Case) -> None:
    model, truth = case.model(), case.truth(3, M)
    with GradDotProdEngine(model, M, micro_batches=2) as engine:
        dots = step(engine, case, model, [[0.0], [0.0, 0.5]])  # the first micro-batch weighs nothing at all
    assert dots.isnan().tolist() == [True, True, False]
    only = Truth([truth.gradients[2], *truth.gradients[3:]], truth.losses[2:], 1)
    assert only.dot_error(dots[2:]) < 1e-10
    assert weighted_gradient_error(truth, model, torch.tensor([0.0, 0.0, 0.5])) < 1e-10


@pytest.mark.parametrize("case", [FUSED, PLAIN], ids=lambda case: case.name)
def test_exact_values_carry_the_weights(case: Case) -> None:
    """Their sum is checked against `.grad`; one row's is that of the row at weight 1, times its weight."""
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes, weights = [3, 2], [torch.tensor([0.3, 0.0, 0.2]).double(), torch.tensor([0.05, 0.6]).double()]
    x, y = case.data(sum(sizes) + M)
    engine = GradDotProdEngine(model, M)
    engine.attach(optimizer)
    engine.begin_update(2)
    step(engine, case, model, [each.tolist() for each in weights])
    rows = [slice(0, 3), slice(3, 5)]
    train = [lambda own=own: case.losses(model, x[own], y[own]) for own in rows]
    found = engine.exact_values(
        train, lambda: case.losses(model, x[5:], y[5:]), clip_factor=1.0, row_weights=weights
    )
    values = torch.cat(found.values)
    truth = case.truth(5, M)
    flat = torch.cat(weights)
    moved = flat @ truth.vectors()[:5]
    before = truth.vectors()[5:].mean(0)
    with torch.no_grad():  # the gradient after the step, by the oracle at the moved parameters
        start = 0
        for p in model.parameters():
            p.sub_(0.1 * moved[start : start + p.numel()].view_as(p))
            start += p.numel()
    engine.detach()
    after = case.truth(5, M, model=model).vectors()[5:].mean(0)
    want = 0.1 * flat * (truth.vectors()[:5] @ (before + after) / 2)
    assert torch.allclose(values, want, rtol=1e-9, atol=1e-12)
    assert values[1] == 0


def test_the_weights_are_not_those_of_grad() -> None:
    case = PLAIN
    model = case.model()
    engine = GradDotProdEngine(model, M)
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    step(engine, case, model, [[0.3, 0.2]])
    x, y = case.data(2 + M)
    calls = [lambda: case.losses(model, x[:2], y[:2])], lambda: case.losses(model, x[2:], y[2:])

    def values(**options: Any) -> Any:
        return engine.exact_values(*calls, clip_factor=1.0, **options)

    with pytest.raises(ValueError, match="add up to"):
        values(row_weights=[torch.tensor([0.3, 0.4])])
    with pytest.raises(ValueError, match="add up to"):
        values(global_rows=2)
    with pytest.raises(ValueError, match="one of them"):
        values()
    with pytest.raises(ValueError, match=r"row_weights of shapes \[\(3,\)\]"):
        values(row_weights=[torch.ones(3)])
    with pytest.raises(ValueError, match="finite and not negative"):
        values(row_weights=[torch.tensor([0.3, -0.2])])


def test_misuse() -> None:
    model, (x, y) = PLAIN.model(), PLAIN.data(5)
    engine = GradDotProdEngine(model, M)
    with pytest.raises(RuntimeError, match="attach the engine first"):
        engine.begin_update(2)
    with engine:
        losses = PLAIN.losses(model, x, y)
        for wrong, message in [
            (torch.tensor([1.0, -1.0, 1.0]), "finite and not negative"),
            (torch.tensor([1.0, torch.nan, 1.0]), "finite and not negative"),
            (torch.ones(5), r"each of the pass's 3 train rows, \(3,\); got \(5,\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                engine.joint_loss(losses, wrong)
        engine.begin_pass(torch.ones(3))
        losses = PLAIN.losses(model, x, y)
        with pytest.raises(ValueError, match="do not give them again"):
            engine.joint_loss(losses, torch.ones(3))
        engine.joint_loss(losses)
        with pytest.raises(ValueError, match="micro_batches must be at least 1"):
            engine.begin_update(0)
        engine.begin_update(2)
        step(engine, PLAIN, model, [[1.0]])
        with pytest.raises(RuntimeError, match="another update begins after 1 of 2 micro-batches"):
            engine.begin_update(3)
    pairs = GradDotProdEngine(model, M, granularity="pairwise")
    with pairs, pytest.raises(ValueError, match="several micro-batches with granularity='pairwise'"):
        pairs.begin_update(2)
    layers = GradDotProdEngine(PLAIN.model(), M, granularity="per_layer")
    tied = GradDotProdEngine(TIED.model(), M, granularity="per_layer")
    with layers:
        layers.begin_update(2)
    with tied, pytest.raises(ValueError, match="tied weights"):
        tied.begin_update(2)


def test_a_fused_head_must_know_the_weights_beforehand() -> None:
    model, (x, y) = FUSED.model(), FUSED.data(5)
    with GradDotProdEngine(model, M) as engine:
        losses = FUSED.losses(model, x, y)
        with pytest.raises(ValueError, match=r"engine.begin_pass\(row_weights\)"):
            engine.joint_loss(losses, torch.ones(3))
        engine.begin_pass(torch.ones(2))
        with pytest.raises(ValueError, match="each of the pass's 3 train rows"):
            FUSED.losses(model, x, y)
        engine.joint_loss(FUSED.losses(model, x, y)).backward()  # the wrong weights are not kept
        engine.prepare_gradients()
