"""A row's value by target: against one backward pass for each target, by plain autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_NAME, T, hf_logits, seeded, tiny_llama, token_rows
from coming_steps import ADAM, LR, M, N, State, prepared
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ghostEngines import GradDotProdEngine, are_by_target, losses_by_target, per_sample_losses
from ghostEngines.updates import Updates
from ghostEngines.validation_gradient import point_after

Logits = Callable[[Any, Tensor], Tensor]
SGD = partial(torch.optim.SGD, lr=LR)


def by_backward_passes(
    model: nn.Module, logits: Logits, x: Tensor, y: Tensor, direction: dict[str, Tensor]
) -> tuple[Tensor, float]:
    """<gradient of each target's part of ℓ_i, direction>, and the largest product of norms, for the scale."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([direction[name].flatten() for name in named])
    want, scale = torch.zeros(*y.shape, dtype=torch.float64), 0.0
    for i, t in (y != -100).nonzero().tolist():
        own = logits(model, x[i : i + 1])[0, t]
        loss = (own.logsumexp(0) - own[y[i, t]]) / (y[i] != -100).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named.values()))])
        want[i, t] = gradient @ flat
        scale = max(scale, (gradient.norm() * flat.norm()).item())
    return want, scale


def drawn(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name", ["fused-gpt2-tied-padded", "fused-gpt2-untied", "gpt2-tied-padded", "embedding"]
)
@pytest.mark.parametrize("part", [512, T - 1])
def test_any_direction(name: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """part: of the fused head, whose rows may be in pieces."""
    monkeypatch.setattr("ghostEngines.layer_rules.cross_entropy_head.PART_POSITIONS", part)
    case = BY_NAME[name]
    model, (x, y) = case.model(), case.data(N)
    direction = drawn(model)
    got = GradDotProdEngine(model, M).by_target(lambda: case.losses(model, x, y), direction)
    want, scale = by_backward_passes(case.model(), case.logits, x, y, direction)
    assert got.shape == (N, T) and (got - want).abs().max() < 1e-10 * scale
    assert (got[y == -100] == 0).all() and got[y != -100].abs().min() > 0


def test_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: Any, x: Tensor) -> Tensor:  # Hugging Face's rounds to float32
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model, (x, y) = seeded(tiny_llama), token_rows()
    y[1, :2] = -100
    direction = drawn(model)
    got = GradDotProdEngine(model, M).by_target(lambda: per_sample_losses(model, x, y), direction)
    want, scale = by_backward_passes(seeded(tiny_llama), hf_logits, x, y, direction)
    assert (got - want).abs().max() < 1e-10 * scale


def exact(state: State, train: Callable[[], Tensor] | None = None, **options: Any) -> Any:
    losses = train or state.losses(slice(0, N))
    return state.engine.exact_values(
        [losses], state.losses(slice(N, None)), clip_factor=state.clip_factor, global_rows=N, **options
    )


@pytest.mark.parametrize("name", ["fused-gpt2-tied-padded", "gpt2-tied-padded"])
def test_exact_values_by_target(name: str) -> None:
    """Under plain SGD, where a part is lr/n·<G, gradient>: G the mean of the gradients at both ends."""
    state = prepared(name, SGD, warm=0)
    direction = {key: torch.zeros_like(p) for key, p in state.model.named_parameters()}
    for each in (False, True):
        twin = state.case.model()
        point = point_after(state.model, Updates(state.optimizer), with_gradients=each)
        for key, parameter in twin.named_parameters():
            parameter.data = point[key]
        losses = state.case.losses(twin, state.x[N:], state.y[N:])
        gradients = torch.autograd.grad(losses.mean(), list(twin.parameters()))
        for total, gradient in zip(direction.values(), gradients, strict=True):
            total += gradient / 2
    got = exact(state, by_target=True)
    want, scale = by_backward_passes(
        state.case.model(), state.case.logits, state.x[:N], state.y[:N], direction
    )
    assert (got.by_target[0] * N / LR - want).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("name", ["fused-gpt2-tied-padded", "gpt2-untied"])
def test_parts_add_up_to_the_values(name: str) -> None:
    """Of AdamW's step, clipped."""
    state = prepared(name, partial(torch.optim.AdamW, **ADAM), 0.5)
    whole, split = exact(state), exact(state, by_target=True)
    assert whole.by_target is None and split.by_target[0].shape == (N, T)
    assert torch.equal(split.by_target[0].sum(1), split.values[0])
    assert torch.allclose(
        split.values[0], whole.values[0], rtol=0, atol=1e-12 * whole.values[0].abs().max().item()
    )
    assert (split.by_target[0][state.y[:N] == -100] == 0).all()


def test_samples_that_are_not_rows() -> None:
    """The parts of each sample in the order of its own positions, those of a short one padded with zeros."""
    case = BY_NAME["embedding"]
    model, (x, y) = case.model(), case.data(2)
    samples = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]])
    with losses_by_target():
        parts = per_sample_losses(model, x, y, samples=samples)
    assert torch.allclose(parts.sum(1), per_sample_losses(model, x, y, samples=samples), rtol=1e-14)
    assert parts.shape == (3, T) and (parts[0, 2:] == 0).all() and (parts[2] > 0).all()


def test_a_loss_of_ones_own() -> None:
    state = prepared("gpt2-tied-padded", SGD)
    asked = []

    def losses(rows: slice) -> Tensor:
        asked.append(are_by_target())
        x, y = state.x[rows], state.y[rows]
        logits = state.case.logits(state.model, x)
        parts = nn.functional.cross_entropy(logits.mT, y, reduction="none") / (y != -100).sum(1, keepdim=True)
        return parts if are_by_target() else parts.sum(1)

    got = exact(state, lambda: losses(slice(0, N)), by_target=True)
    assert asked == [True] and not are_by_target()
    assert torch.allclose(got.by_target[0], exact(state, by_target=True).by_target[0], rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match="add up to"):
        exact(state, lambda: 2 * losses(slice(0, N)), by_target=True)


def test_what_is_refused() -> None:
    state = prepared("fused-gpt2-tied", SGD)
    losses, direction = state.losses(slice(0, N)), drawn(state.model)
    with pytest.raises(
        ValueError, match=r"\(n, T\), whose sum over T is its loss; got shape \(4,\).*losses_by_target"
    ):
        exact(state, lambda: losses().sum(1), by_target=True)
    with (
        pytest.raises(ValueError, match=r"one loss per sample, \(n,\); got shape \(2, 6\)"),
        losses_by_target(),
    ):
        exact(state)
    with pytest.raises(RuntimeError, match="for passes without gradients"), losses_by_target():
        losses()
    state.engine.detach()
    with pytest.raises(RuntimeError, match="for passes without gradients"), losses_by_target():
        losses()
    with pytest.raises(ValueError, match="the direction lacks"):
        state.engine.by_target(losses, {})
    with pytest.raises(RuntimeError, match="and not a copy"):
        state.engine.by_target(
            lambda: state.case.losses(state.case.model().requires_grad_(False), state.x, state.y), direction
        )
