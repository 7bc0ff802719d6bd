"""Exact values against the definition: the Aumann-Shapley share of the optimizer's own step.

The oracle has its own AdamW and clipping (Kingma & Ba, arXiv 1412.6980; Pascanu et al., arXiv 1211.5063), and
integrates the derivative of the step's effect by each row's weight, from weight 0 to 1, numerically.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from allocations import Allocations
from cases import BY_NAME, CASES, D, V
from coming_steps import ADAM, LR, WARM, M, N, State, prepared
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.oracle import Truth, per_sample
from ghostEngines import GradDotProdEngine, UpdateRule, per_sample_losses, register_update_rule
from ghostEngines.forward_mode import ForwardMode, directional_derivatives
from ghostEngines.preconditioner import Uniform
from ghostEngines.update_rules import UPDATE_RULES, AdamRule, SGDRule, Update
from ghostEngines.updates import Updates
from ghostEngines.validation_gradient import point_after
from models.causal_lm import CausalLM

NAMES = [case.name for case in CASES]


def own_adam(v: Tensor, m: Tensor, steps: int, gradient: Tensor) -> Tensor:
    """u(g), as in the paper's Algorithm 1."""
    (beta1, beta2), t = ADAM["betas"], steps + 1
    m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
    return m / (1 - beta1**t) / ((v / (1 - beta2**t) + 1e-40).sqrt() + ADAM["eps"])  # sqrt has no slope at 0


def own_clip(gradient: Tensor, largest: float) -> Tensor:
    return gradient * (largest / gradient.norm()).clamp(max=1.0)


def integrate(effects: list[Callable[[Tensor], Tensor]], breaks: list[float]) -> Tensor:
    """∫ ∂effect/∂x_i (τ, ..., τ) dτ from 0 to 1 for each i, (N,). effects: one between each two of the breaks."""
    total = torch.zeros(N, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for effect, (low, high) in zip(effects, pairwise(breaks), strict=True):
        for node, weight in zip(nodes, weights, strict=True):
            x = torch.full((N,), low + (high - low) * (node + 1) / 2, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(effect(x), x)
            total += slope * weight * (high - low) / 2
    return total


def points(state: State) -> list[dict[str, Tensor]]:
    """θ_∅ and θ_{t+1}"""
    updates = Updates(state.optimizer)
    return [point_after(state.model, updates, with_gradients=each) for each in (False, True)]


def ends_of_batch(state: State) -> tuple[Tensor, Tensor]:
    """Validation gradients at θ_∅ and θ_{t+1}, from plain backward passes."""
    idle, after = (truth_at(state, point).vectors()[N:].mean(0) for point in points(state))
    return idle, after


def direction_of_batch(state: State) -> Tensor:
    """G on the way from θ_∅ to θ_{t+1}."""
    idle, after = ends_of_batch(state)
    return (idle + after) / 2


def truth_at(state: State, point: dict[str, Tensor]) -> Truth:
    twin = state.case.model()
    twin.load_state_dict(state.model.state_dict())
    for name, parameter in twin.named_parameters():
        if name in point:
            parameter.data = point[name]
    return per_sample(twin, state.case.logits, state.x, state.y, N)


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("name", ["linear-3d", "gpt2-tied-padded", "fused-gpt2-untied"])
def test_values_are_aumann_shapley_shares_of_adamw_s_step(name: str, clip: float) -> None:
    state = prepared(name, partial(torch.optim.AdamW, **ADAM), clip)
    rows, m, v = state.truth.vectors()[:N], state.state("exp_avg"), state.state("exp_avg_sq")
    idle, after = ends_of_batch(state)
    largest = (clip or 2.0) * rows.mean(0).norm().item()

    def effect_along(direction: Tensor, x: Tensor) -> Tensor:
        gradient = own_clip((x[:, None] * rows).mean(0), largest)
        return LR * direction @ own_adam(v, m, WARM, gradient)

    got = state.exact()
    effect = partial(effect_along, (idle + after) / 2)
    # Where all weights are above c, the step ends where it ends with all of them 1, and the gradient there counts.
    want = integrate([effect, partial(effect_along, after) if clip else effect], [0.0, clip or 0.5, 1.0])
    assert torch.allclose(got.values[0], want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    everything, nothing = (effect(torch.full((N,), x, dtype=torch.float64)) for x in (1.0, 1e-12))
    assert got.values[0].sum().item() == pytest.approx((everything - nothing).item(), rel=1e-9)
    assert got.of_batch == pytest.approx(got.values[0].sum().item(), rel=1e-10)
    assert (got.values[0] - got.values[0].mean()).abs().max() > 1e-3 * got.values[0].abs().max()


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, **ADAM),
        partial(torch.optim.AdamW, **ADAM, fused=True),
        partial(torch.optim.AdamW, **ADAM, foreach=True),
        partial(torch.optim.Adam, lr=LR, eps=1e-3),
        partial(torch.optim.SGD, lr=LR, weight_decay=0.1),
        partial(torch.optim.SGD, lr=LR, momentum=0.9, dampening=0.2, weight_decay=0.1),
        partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True, fused=True),
    ],
)
@pytest.mark.parametrize("warm", [0, WARM])
def test_the_point_after_is_where_the_optimizer_goes(make: Callable[..., Any], warm: int) -> None:
    """And the parts of its way add up to the fall that the direction sees."""
    state = prepared("fused-gpt2-tied-padded", make, 0.5, warm)
    idle, after = points(state)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    direction, got = direction_of_batch(state), state.exact()
    losses = [
        truth.losses[N:].mean().item()
        for truth in (state.truth, truth_at(state, idle), truth_at(state, after))
    ]
    state.optimizer.step()
    for name, parameter in state.model.named_parameters():
        assert torch.allclose(parameter, after[name], rtol=0, atol=1e-12)
    way = torch.cat([(idle[name] - after[name]).flatten() for name in before])
    assert got.momentum + got.decay == pytest.approx(losses[0] - losses[1], rel=1e-8, abs=1e-14)
    assert got.of_batch == pytest.approx((direction @ way).item(), rel=1e-8)
    assert got.measured == pytest.approx(losses[0] - losses[2], rel=1e-8)
    (group, *_) = state.optimizer.param_groups
    assert (got.decay != 0) == (group["weight_decay"] != 0)
    assert got.measured == pytest.approx(got.predicted, rel=0.1)  # the rest is of third order in the step
    assert 0.5 < got.cosine < 1


def test_look_ahead_is_the_step_without_gradients() -> None:
    state = prepared("gpt2-tied", partial(torch.optim.AdamW, **ADAM))
    after = point_after(state.model, Updates(state.optimizer), with_gradients=False)
    want = truth_at(state, after).vectors()[N:].mean(0)
    got, _ = state.engine.validation_gradient(state.losses(slice(N, None)), lookahead=True)
    flat = torch.cat([got[name].flatten() for name, _ in state.model.named_parameters()])
    assert torch.allclose(flat, want, rtol=0, atol=1e-10 * want.norm().item())
    for parameter in state.model.parameters():
        parameter.grad.zero_()
    state.optimizer.step()
    for name, parameter in state.model.named_parameters():
        assert torch.allclose(parameter, after[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lr", [1e-2, 1e-8])
def test_small_learning_rates_keep_their_digits(lr: float) -> None:
    """In float32, where the tangent is far smaller than the gradients that it is made of."""
    case, values = BY_NAME["gpt2-untied"], []
    for dtype in (torch.float64, torch.float32):
        model = case.model().to(dtype)
        optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=lr), case.data(N + M, seed=1)
        engine = GradDotProdEngine(model, M)
        engine.attach(optimizer)
        engine.joint_loss(case.losses(model, x, y)).backward()
        engine.prepare_gradients()
        train, validation = (
            partial(case.losses, model, x[some], y[some]) for some in (slice(N), slice(N, None))
        )
        got = engine.exact_values([train], validation, clip_factor=1.0, global_rows=N)
        values.append(got.values[0].double() / lr)
    assert torch.allclose(values[1], values[0], rtol=0, atol=2e-5 * values[0].abs().max().item())


class Expert(nn.Module):
    """A second layer for rows of a positive sum alone, which is never run on rows that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.expert = nn.Linear(D, V), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.sum(-1) > 0
        out = self.common(x)
        return torch.where(chosen[:, None], out + self.expert(x), out) if chosen.any() else out


def test_a_layer_that_the_validation_rows_do_not_use() -> None:
    """It is clipped with the others; else the values would not add up, which `exact_values` checks."""
    torch.manual_seed(0)
    model, x, y = Expert().double(), torch.randn(N + M, D).double().abs(), torch.arange(N + M) % V
    x[N:] *= -1
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine = GradDotProdEngine(model, M, guard=False)
    engine.attach(optimizer)
    engine.joint_loss(per_sample_losses(model, x, y)).backward()
    engine.prepare_gradients()
    assert model.expert.weight.grad is not None
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= 0.25
    train, validation = (
        partial(per_sample_losses, model, x[some], y[some]) for some in (slice(N), slice(N, None))
    )
    got = engine.exact_values([train], validation, clip_factor=0.25, global_rows=N)
    assert got.values[0].sum().item() == pytest.approx(got.of_batch, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer(name: str) -> None:
    """The whole chain on plain SGD, where a value is lr/n·<G, ∇ℓ_i>: G of the mean of two points."""
    state = prepared(name, partial(torch.optim.SGD, lr=LR), warm=0)
    trained = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    direction = direction_of_batch(state)
    got = state.exact().values[0]
    rows = state.truth.vectors()[:N]
    error = (got * N / LR - rows @ direction).abs() / (rows.norm(dim=1) * direction.norm())
    assert trained and error.max() < 1e-10


def test_an_entry_that_never_had_a_gradient() -> None:
    """s = 0: A = J = a/ε, and no division by zero."""
    group = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "lr": 1.0, "amsgrad": False}
    zeros = torch.zeros(3, dtype=torch.float64)
    state = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.tensor(9.0)}
    update = AdamRule().update(group, state, zeros, torch.tensor([0.0, 1e-3, -1e-3], dtype=torch.float64))
    a = 0.1 / (1 - 0.9**10)
    assert update.share()[0] == update.slope()[0] == pytest.approx(a / 1e-8)
    assert all(
        each.isfinite().all() for each in (update.step(), update.idle(), update.share(), update.slope())
    )
    assert torch.allclose(update.share()[1:] * torch.tensor([1e-3, -1e-3]).double(), update.step()[1:])


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_pieces(causal: bool, mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostEngines.forward_mode.ATTENTION_NUMEL", 50)
    q, k, v = (torch.randn(2, heads, 7, 4, dtype=torch.float64) for heads in (4, 2, 1))
    allowed = torch.rand(2, 1, 7, 7) > 0.4
    allowed[0, 0, 3] = False  # a query that sees no key
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": True, "scale": 0.3}
    if mask is not None:
        if causal:
            return  # PyTorch takes one of them
        options["attn_mask"] = allowed if mask == "bool" else torch.randn(2, 1, 7, 7, dtype=torch.float64)
    want = functional.scaled_dot_product_attention(q, k, v, **options)
    with ForwardMode():
        got = functional.scaled_dot_product_attention(q, k, v, **options)
        none = functional.scaled_dot_product_attention(q[..., :0, :], k, v, enable_gqa=True)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12) and none.shape == (2, 4, 0, 4)


def test_half_precision_is_widened() -> None:
    state = prepared("fused-gpt2-tied-padded", partial(torch.optim.SGD, lr=LR), warm=0)
    want = state.exact().values[0]
    half = deepcopy(state.case.model()).bfloat16()
    exact_half = deepcopy(half).double()
    tangent = {name: torch.randn_like(p, dtype=torch.float32) for name, p in half.named_parameters()}
    args = state.x[:N], state.y[:N]
    _, got = directional_derivatives(half, tangent, lambda: state.case.losses(half, *args))
    _, wide = directional_derivatives(
        exact_half, {k: v.double() for k, v in tangent.items()}, lambda: state.case.losses(exact_half, *args)
    )
    assert got.dtype == torch.float32 and torch.allclose(got.double(), wide, rtol=1e-4, atol=1e-4)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters()) and want.isfinite().all()


def test_no_tensor_of_all_attention_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of all logits: what forward-mode differentiation makes is no larger than what training does."""
    monkeypatch.setattr("ghostEngines.forward_mode.ATTENTION_NUMEL", 256)
    monkeypatch.setattr("ghostEngines.layer_rules.cross_entropy_head.PART_POSITIONS", 4)
    config = GPT2Config(
        vocab_size=400,
        n_positions=64,
        n_embd=8,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model, x = CausalLM(GPT2LMHeadModel(config)), torch.randint(400, (2, 65))
    tangents = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with Allocations() as made:
        directional_derivatives(model, tangents, lambda: model(x[:, :-1], x[:, 1:]))
    assert made.largest < 4 * min(2 * 4 * 64 * 64, 2 * 64 * 400) / 4  # bytes: a quarter of the smaller


def test_inside_accelerate_s_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for accelerate.optimizer.AcceleratedOptimizer, which keeps the optimizer in `optimizer`."""

    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    module = ModuleType("accelerate.optimizer")
    vars(module)["AcceleratedOptimizer"] = AcceleratedOptimizer
    monkeypatch.setitem(sys.modules, "accelerate.optimizer", module)
    model = nn.Linear(2, 2)
    inner = torch.optim.AdamW(model.parameters())
    assert [each.parameter for each in Updates(AcceleratedOptimizer(inner)).members()] == [
        *model.parameters()
    ]


class SignDescent(torch.optim.Optimizer):
    """An optimizer of one's own: tanh of the gradient."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.tanh()


class SignRule(UpdateRule):
    def check(self, group: Any) -> None:
        pass

    def preconditioner(self, group: Any, state: Any) -> Uniform:
        return Uniform(1.0)

    def update(self, group: Any, state: Any, parameter: Tensor, gradient: Tensor) -> Update:
        return Sign(gradient)


@dataclass
class Sign(Update):
    gradient: Tensor

    def step(self) -> Tensor:
        return self.gradient.tanh()

    def idle(self) -> Tensor:
        return torch.zeros_like(self.gradient)

    decay = idle

    def share(self) -> Tensor:
        return torch.where(self.gradient == 0, 1.0, self.step() / self.gradient)

    def slope(self) -> Tensor:
        return 1 - self.step() ** 2


def test_a_rule_of_ones_own(request: pytest.FixtureRequest) -> None:
    register_update_rule(SignDescent, SignRule())
    request.addfinalizer(lambda: UPDATE_RULES.pop(SignDescent))
    with pytest.raises(ValueError, match="already"):
        register_update_rule(SignDescent, SGDRule())
    state = prepared("gpt2-untied", partial(SignDescent, lr=LR), 0.5, warm=1)
    got = state.exact()
    assert got.values[0].sum().item() == pytest.approx(got.of_batch, rel=1e-9)
    assert got.measured == pytest.approx(got.predicted, rel=0.05)
