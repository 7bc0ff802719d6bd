"""A direction that is given: <∇ℓ_i, D> for any D, without validation rows in the batch."""

from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.oracle import Truth, per_sample
from ghostEngines import AttachError, GradDotProdEngine

N, LR = 4, 1e-2
NAMES = [case.name for case in CASES]
TIED = ["tied-linear", "gpt2-tied", "fused-gpt2-tied-padded"]


def random_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def flat(model: nn.Module, direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([direction[name].flatten() for name, p in model.named_parameters() if p.requires_grad])


def step(
    engine: GradDotProdEngine, case: Case, model: Any, rows: int, micro: int = 1, seed: int = 1
) -> tuple[Tensor, Truth]:
    """Dots of a step of rows·micro train rows, and the truth."""
    x, y = case.data(rows * micro, seed)
    twin = case.model()
    twin.load_state_dict(model.state_dict())
    truth = per_sample(twin, case.logits, x, y, rows * micro)
    dots = []
    for start in range(0, rows * micro, rows):
        some = slice(start, start + rows)
        engine.joint_loss(case.losses(model, x[some], y[some])).backward()
        engine.prepare_gradients()
        dots.append(engine.dot_products())
    return torch.cat(dots), truth


def error(got: Tensor, truth: Truth, directions: Tensor) -> float:
    rows = truth.vectors()
    want = rows @ directions.T
    norms = rows.norm(dim=1)[:, None] * directions.norm(dim=1)
    assert got.shape in (want.shape, want.shape[:1])
    return ((got.view_as(want) - want).abs() / norms).max().item()


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_one_direction(name: str, micro: int) -> None:
    case = BY_NAME[name]
    model = case.model()
    engine = GradDotProdEngine(model, 1, micro_batches=micro)
    engine.attach()
    direction = random_direction(model, 0)
    engine.use_direction(direction)
    dots, truth = step(engine, case, model, N, micro)
    assert dots.shape == (N * micro,)
    assert error(dots, truth, flat(model, direction)[None]) < 1e-10
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("strategy", [None, "project", "instantiate"])
@pytest.mark.parametrize("name", [*TIED, "conv1d", "convolution", "rms-norm"])
def test_several_by_name(name: str, strategy: str | None) -> None:
    case = BY_NAME[name]
    model = case.model()
    engine = GradDotProdEngine(model, 1, strategy=strategy)
    engine.attach()
    named = {f"d{seed}": random_direction(model, seed) for seed in range(3)}
    engine.use_direction(named)
    dots, truth = step(engine, case, model, N)
    assert dots.shape == (N, 3)
    assert error(dots, truth, torch.stack([flat(model, each) for each in named.values()])) < 1e-10


@pytest.mark.parametrize("name", ["linear-3d", "fused-gpt2-untied"])
def test_per_layer(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    engine = GradDotProdEngine(model, 1, granularity="per_layer")
    engine.attach()
    direction = random_direction(model, 0)
    engine.use_direction(direction)
    dots, truth = step(engine, case, model, N)
    for column, layer in enumerate(engine.layer_names):
        part = {k: d if k.rpartition(".")[0] == layer else torch.zeros_like(d) for k, d in direction.items()}
        assert error(dots[:, column], truth, flat(model, part)[None]) < 1e-10


@pytest.mark.parametrize("name", TIED)
def test_adamw_weighs_it_anew_in_each_step(name: str) -> None:
    """And the joint batch gives the same scores, with the gradient of its validation rows as the direction."""
    case = BY_NAME[name]
    dots = []
    for given in (False, True):
        model = case.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-3)
        engine = GradDotProdEngine(model, 2, direction="auto")
        engine.attach(optimizer)
        for number in range(4):
            x, y = case.data(N + 2, seed=1 + number)
            if given:
                gradient, _ = engine.validation_gradient(partial(case.losses, model, x[N:], y[N:]))
                engine.use_direction(gradient)
                x, y = x[:N], y[:N]
            engine.joint_loss(case.losses(model, x, y)).backward()
            engine.prepare_gradients()
            assert engine.scored == (number > 0)
            dots.append(engine.dot_products())
            optimizer.step()
            optimizer.zero_grad()
    assert dots[0].isnan().all() and dots[4].isnan().all()
    for joint, own in zip(dots[1:4], dots[5:], strict=True):
        assert torch.allclose(joint, own, rtol=1e-9, atol=1e-9 * joint.abs().max().item())


def test_groups_with_learning_rates_of_their_own() -> None:
    """A score is relative to the largest learning rate."""
    case = BY_NAME["linear-3d"]
    model = case.model()
    first, second = model[0].parameters(), model[2].parameters()
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.4}])
    engine = GradDotProdEngine(model, 1, direction="auto")
    engine.attach(optimizer)
    direction = random_direction(model, 0)
    engine.use_direction(direction)
    dots, truth = step(engine, case, model, N)
    weighed = {name: d * (0.25 if name.startswith("0") else 1.0) for name, d in direction.items()}
    assert engine.lr == 0.4
    assert error(dots, truth, flat(model, weighed)[None]) < 1e-10


def test_back_to_the_validation_rows() -> None:
    case = BY_NAME["gpt2-tied"]
    model = case.model()
    engine = GradDotProdEngine(model, 1)
    engine.attach()
    engine.use_direction(random_direction(model, 0))
    step(engine, case, model, N)
    model.zero_grad()
    engine.use_direction(None)
    with pytest.raises(RuntimeError, match="call prepare_gradients"):
        engine.dot_products()
    x, y = case.data(N + 1)
    truth = case.truth(N, 1)
    engine.joint_loss(case.losses(model, x, y)).backward()
    engine.prepare_gradients()
    assert truth.dot_error(engine.dot_products()) < 1e-10


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Conv1D(2, 2))
    engine = GradDotProdEngine(model, 1)
    with pytest.raises(RuntimeError, match="attach the engine first"):
        engine.use_direction({})
    engine.attach()
    direction = random_direction(model, 0)
    with pytest.raises(ValueError, match=r"lacks '1.weight'"):
        engine.use_direction({name: d for name, d in direction.items() if name != "1.weight"})
    with pytest.raises(ValueError, match="unknown 'other'"):
        engine.use_direction({**direction, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(3,\), the parameter \(2,\)"):
        engine.use_direction({**direction, "0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"has dtype torch.float64, the parameter torch.float32"):
        engine.use_direction({**direction, "0.bias": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(ValueError, match="and several are one such mapping for each name"):
        engine.use_direction({"a": direction, "b": torch.zeros(2)})  # type: ignore[arg-type]
    engine.detach()  # a refused direction is not kept
    engine.attach()
    engine.use_direction(direction)
    engine.detach()
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"has an unknown '0.bias'"):
        engine.attach()
    engine.use_direction(None)
    engine.attach()
    model[0].bias.requires_grad_(True)
    model = nn.Sequential(nn.Linear(2, 2))
    pairwise, gram = (
        GradDotProdEngine(model, 1, granularity="pairwise"),
        GradDotProdEngine(model, 1, strategy="gram"),
    )
    for other in (pairwise, gram):
        other.attach()
        with pytest.raises(AttachError, match="need the validation rows"):
            other.use_direction(random_direction(other.model, 0))
        other.detach()
