"""Exact values leave everything as it was, and what they cannot be computed of is an error that says so."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_NAME, D, V, mlp
from coming_steps import ADAM, LR, M, N, prepared
from torch import Tensor, nn

from benchmarks.oracle import per_sample
from ghostEngines import AttachError, ExactValues, GradDotProdEngine, per_sample_losses
from ghostEngines.forward_mode import directional_derivatives
from ghostEngines.own_passes import mean_loss

ADAMW = partial(torch.optim.AdamW, **ADAM)
SGD = partial(torch.optim.SGD, lr=LR)


def test_nothing_is_changed() -> None:
    state = prepared("fused-gpt2-tied-padded", partial(torch.optim.AdamW, **ADAM), 0.5)
    model, optimizer = state.model, state.optimizer

    def everything() -> list[Tensor]:
        return [
            *(p.detach() for p in model.parameters()),
            *(p.grad for p in model.parameters()),
            *(t for p in model.parameters() for t in optimizer.state[p].values()),
            state.engine.dot_products(),
            torch.get_rng_state(),
        ]

    before = deepcopy(everything())
    parameters = [id(p) for p in model.parameters()]
    state.exact()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert parameters == [id(p) for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    state.engine.joint_loss(
        state.case.losses(model, state.x, state.y)
    ).backward()  # and the next step goes on
    state.engine.prepare_gradients()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(torch.optim.AdamW, amsgrad=True), "amsgrad"),
        (partial(torch.optim.AdamW, maximize=True), "maximize"),
        (partial(torch.optim.SGD, maximize=True), "maximize"),
        (partial(torch.optim.Adam, weight_decay=0.1), "adds it to the gradient"),
        (torch.optim.NAdam, "no update rule for the optimizer NAdam"),
        (type("MyAdamW", (torch.optim.AdamW,), {}), "no update rule for the optimizer MyAdamW"),
    ],
)
def test_optimizers_that_are_refused(make: Callable[..., Any], message: str) -> None:
    model = nn.Linear(2, 2)
    engine = GradDotProdEngine(model, 1, direction="auto")
    with pytest.raises(AttachError, match=message):
        engine.attach(make(model.parameters()))
    engine = GradDotProdEngine(model, 1)  # the gradient itself needs no rule
    engine.attach(make(model.parameters()))
    with pytest.raises(AttachError, match=message):
        engine.exact_values([], lambda: torch.zeros(1), clip_factor=1.0, global_rows=1)


def test_values_that_do_not_add_up() -> None:
    """Other rows than those of the step, another clip factor, a model that is a copy."""
    state = prepared("gpt2-untied", partial(torch.optim.AdamW, **ADAM), 0.5)
    validation = state.losses(slice(N, None))

    def exact(losses: Callable[[], Tensor], clip_factor: float = 0.5) -> ExactValues:
        return state.engine.exact_values([losses], validation, clip_factor=clip_factor, global_rows=N)

    exact(state.losses(slice(0, N)))
    with pytest.raises(ValueError, match="add up to"):
        exact(state.losses(slice(1, N + 1)))
    with pytest.raises(ValueError, match="add up to"):
        exact(state.losses(slice(0, N)), clip_factor=0.4)
    twin = deepcopy(state.case.model())
    with pytest.raises(RuntimeError, match="and not a copy"):
        exact(lambda: state.case.losses(twin, state.x[:N], state.y[:N]))


def test_without_an_optimizer() -> None:
    engine = GradDotProdEngine(nn.Linear(2, 2), 1)
    engine.attach()
    with pytest.raises(RuntimeError, match="attach the engine with the optimizer"):
        engine.exact_values([], lambda: torch.zeros(1), clip_factor=1.0, global_rows=1)


class Counting(nn.Module):
    """Counts its calls, in place and in new tensors, and adds the counts to what it returns. It draws, too."""

    count: Tensor
    hidden: Tensor
    other: Tensor
    late: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()))
        self.register_buffer("other", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.hidden.data.add_(1)
        self.other = self.other + 1
        if self.count > 1:
            self.register_buffer("late", torch.rand(()))
        return x + self.count + self.hidden + self.other


class Detour(nn.Module):
    """Divides by a norm that has no gradient, or, evaluated, by one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = x.norm(dim=-1, keepdim=True)
        return x / norm if torch.is_grad_enabled() else x


def test_buffers_are_restored() -> None:
    model = nn.Sequential(mlp(True), Counting()).double()
    optimizer, (x, y) = SGD(model.parameters()), BY_NAME["linear-3d"].data(N + M)
    engine = GradDotProdEngine(model, M, guard=False)
    engine.attach(optimizer)
    engine.joint_loss(per_sample_losses(model, x, y)).backward()
    engine.prepare_gradients()
    buffers = list(model[-1].buffers())
    before, random = deepcopy(buffers), torch.get_rng_state()
    train, validation = (
        partial(per_sample_losses, model, x[rows], y[rows]) for rows in (slice(N), slice(N, None))
    )
    engine.exact_values([train], validation, clip_factor=1.0, global_rows=N)
    engine.validation_gradient(validation)
    after = list(model[-1].buffers())
    assert all(a is b and torch.equal(b, c) for a, b, c in zip(after, buffers, before, strict=True))
    assert before[0] == 1 and torch.equal(torch.get_rng_state(), random)


class Square(torch.autograd.Function):
    """With a derivative in both modes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * backprops[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangents[0]


class SquareDetour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            part = Square.apply(x)
        return Square.apply(x) + part * x


@pytest.mark.parametrize("detour", [Detour, SquareDetour])
def test_blocks_without_gradients(detour: type[nn.Module]) -> None:
    """They have no derivative forwards either, and a model runs as in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), detour(), nn.Linear(D, V)).double()
    x, y = BY_NAME["linear-3d"].data(N)
    assert mean_loss(model, partial(per_sample_losses, model, x, y)) == pytest.approx(
        per_sample_losses(model, x, y).mean().item(), rel=1e-12
    )
    tangents = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    losses, got = directional_derivatives(model, tangents, lambda: per_sample_losses(model, x, y))
    want = per_sample(model, nn.Module.__call__, x, y, N)
    assert torch.allclose(losses, want.losses, rtol=1e-12)
    assert torch.allclose(
        got, want.vectors() @ torch.cat([t.flatten() for t in tangents.values()]), rtol=1e-10
    )


def test_an_encoder_in_eval_mode() -> None:
    """PyTorch has a fast path for it, without a forward-mode derivative."""
    encoder = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True).eval().requires_grad_(False)
    model = nn.Sequential(nn.Linear(D, D), encoder, nn.Linear(D, V)).double()
    x, y = BY_NAME["linear-3d"].data(N)
    tangents = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    _, got = directional_derivatives(model, tangents, lambda: per_sample_losses(model, x, y))
    losses = per_sample_losses(model, x, y)
    trained = [p for p in model.parameters() if p.requires_grad]
    for loss, derivative in zip(losses, got, strict=True):
        rows = torch.autograd.grad(loss, trained, retain_graph=True)
        want = sum((row * t).sum() for row, t in zip(rows, tangents.values(), strict=True))
        assert derivative.item() == pytest.approx(float(want), rel=1e-8)


@pytest.mark.parametrize("half", [False, True])
def test_falls_are_not_lost_in_half_precision(half: bool) -> None:
    """They are below bfloat16's rounding of the losses."""
    case = BY_NAME["fused-gpt2-untied"]
    model = case.model().to(torch.bfloat16 if half else torch.float32)
    optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=LR), case.data(N + M, seed=1)
    engine = GradDotProdEngine(model, M)
    engine.attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=not half):
        losses = case.losses(model, x, y)
    engine.joint_loss(losses).backward()
    engine.prepare_gradients()
    train, validation = (partial(case.losses, model, x[rows], y[rows]) for rows in (slice(N), slice(N, None)))
    got = engine.exact_values([train], validation, clip_factor=1.0, global_rows=N)
    of_twin = []
    for take_step in (False, True):
        if take_step:
            optimizer.step()
        twin = case.model()
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            of_twin.append(case.losses(twin, x[N:], y[N:]).mean().item())
    want = of_twin[0] - of_twin[1]
    assert 1e-5 < abs(want) < 0.1 * torch.finfo(torch.bfloat16).eps * of_twin[0]
    assert got.measured == pytest.approx(want, rel=0.02) and abs(got.momentum) < 1e-6
    if not half:  # else the parameters' rounding is a large part of the step
        assert got.of_batch == pytest.approx(want, rel=0.1)


def test_inputs_in_half_precision_are_widened_with_the_parameters() -> None:
    model, (x, y) = mlp(True).bfloat16(), BY_NAME["linear-3d"].data(N)
    engine = GradDotProdEngine(model, M)
    engine.attach()
    gradient, _ = engine.validation_gradient(lambda: per_sample_losses(model, x.bfloat16(), y))
    wide = mlp(True)
    wide.load_state_dict(model.state_dict())
    per_sample_losses(wide, x.bfloat16().float(), y).mean().backward()
    for name, parameter in wide.named_parameters():
        assert parameter.grad is not None and gradient[name].dtype == torch.float32
        assert torch.allclose(gradient[name], parameter.grad, rtol=1e-5, atol=1e-7)


class Rotated(nn.Module):
    """Multiplies by a buffer; or casts to half precision itself."""

    buffer: Tensor

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts
        self.register_buffer("buffer", torch.eye(D, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.buffer).to(torch.bfloat16 if self.casts else x.dtype)


@pytest.mark.parametrize("casts", [False, True])
def test_a_half_precision_model_with_buffers(casts: bool) -> None:
    model = nn.Sequential(Rotated(casts), nn.Linear(D, V)).bfloat16()
    x, y = BY_NAME["linear-3d"].data(N)
    engine = GradDotProdEngine(model, M)
    engine.attach()
    losses = partial(per_sample_losses, model, x.bfloat16(), y)
    if casts:
        with pytest.raises(RuntimeError, match="this one casts to half precision itself"):
            engine.validation_gradient(losses)
    else:
        assert engine.validation_gradient(losses)[0]["1.weight"].isfinite().all()
    assert model[0].buffer.dtype == torch.bfloat16


def test_the_engine_chooses_autocast() -> None:
    state = prepared("gpt2-tied", SGD, warm=0)

    def with_autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return state.losses(slice(N, None))()

    with pytest.raises(RuntimeError, match=r"the losses must not enter torch.autocast"):
        state.engine.exact_values([state.losses(slice(0, N))], with_autocast, clip_factor=1.0, global_rows=N)
    forward = state.model.forward
    state.model.forward = torch.autocast("cpu", torch.bfloat16)(forward)  # as accelerate prepares a model
    with pytest.raises(RuntimeError, match=r"the model must not enter torch.autocast"):
        state.exact()
    state.model.forward = forward
    with torch.autocast("cpu", torch.bfloat16):  # around the call it says nothing
        assert torch.equal(state.exact().values[0], state.exact().values[0])


def test_rows_that_are_not_the_update_s() -> None:
    state = prepared("gpt2-untied", ADAMW)
    validation = state.losses(slice(N, None))
    for rows, count in ((slice(0, N), N + 1), (slice(0, N + M), N), (slice(0, N - 1), N)):
        with pytest.raises(ValueError, match=f"global_rows={count}"):
            state.engine.exact_values([state.losses(rows)], validation, clip_factor=1.0, global_rows=count)


def test_in_the_middle_of_an_accumulation() -> None:
    case = BY_NAME["gpt2-untied"]
    model = case.model()
    optimizer = SGD(model.parameters())
    engine = GradDotProdEngine(model, M, micro_batches=2)
    engine.attach(optimizer)
    x, y = case.data(2 * N + M, seed=1)
    rows = [slice(M, M + N), slice(M + N, None)]
    first = [*range(M, M + N), *range(M)]

    def exact() -> ExactValues:
        each = [lambda some=some: case.losses(model, x[some], y[some]) for some in rows]
        return engine.exact_values(
            each, lambda: case.losses(model, x[:M], y[:M]), clip_factor=1.0, global_rows=2 * N
        )

    engine.joint_loss(case.losses(model, x[first], y[first])).backward()
    engine.prepare_gradients()
    with pytest.raises(RuntimeError, match=r"exact_values\(\) is called after 1 of 2 micro-batches"):
        exact()
    engine.joint_loss(case.losses(model, x[rows[1]], y[rows[1]])).backward()
    engine.prepare_gradients()
    assert [len(each) for each in exact().values] == [N, N]


@pytest.mark.parametrize("make", [ADAMW, partial(ADAMW, fused=True), SGD])
def test_after_the_optimizer_s_step(make: Callable[..., Any]) -> None:
    state = prepared("gpt2-untied", make)
    state.exact()
    state.optimizer.step()
    with pytest.raises(RuntimeError, match="has stepped since"):
        state.exact()
    state.optimizer.zero_grad(set_to_none=False)
    state.engine.joint_loss(state.case.losses(state.model, state.x, state.y)).backward()
    state.engine.prepare_gradients()
    state.exact()


def test_gradients_of_a_pass_without_the_engine() -> None:
    """After the optimizer's step they are new ones."""
    state = prepared("gpt2-untied", ADAMW)
    for _ in range(2):
        state.optimizer.step()
        state.optimizer.zero_grad()
        with state.engine.paused():
            state.losses(slice(0, N))().mean().backward()
        state.exact()


def test_options_that_change_between_steps() -> None:
    state = prepared("gpt2-untied", ADAMW)
    state.engine.detach()
    engine = GradDotProdEngine(state.model, M, direction="auto")
    engine.attach(state.optimizer)
    (group,) = state.optimizer.param_groups
    group["maximize"] = True
    with pytest.raises(AttachError, match="maximize"):
        state.case.losses(state.model, state.x, state.y)
    assert torch._dynamo.eval_frame._stance.stance == "default"  # the guard's uncompiled pass has ended
    with pytest.raises(AttachError, match="maximize"):
        engine.exact_values(
            [state.losses(slice(0, N))], state.losses(slice(N, None)), clip_factor=1.0, global_rows=N
        )


def test_a_preconditioner_that_appears_later() -> None:
    """SGD with dampening multiplies its first gradient by 1, and the others by less."""
    case = BY_NAME["linear-3d"]
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, dampening=0.7)
    engine = GradDotProdEngine(model, M, direction="auto", strategy="gram")
    engine.attach(optimizer)
    x, y = case.data(N + M)
    engine.joint_loss(case.losses(model, x, y)).backward()
    engine.prepare_gradients()
    optimizer.step()
    with pytest.raises(AttachError, match='strategy "gram" makes no direction'):
        case.losses(model, x, y)


def test_a_frozen_parameter_with_a_gradient() -> None:
    state = prepared("gpt2-untied", ADAMW)
    parameter = next(iter(state.model.parameters()))
    parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="a frozen parameter of the optimizer still has a gradient"):
        state.exact()


def test_what_else_is_refused() -> None:
    state = prepared("gpt2-untied", ADAMW)
    train, validation = state.losses(slice(0, N)), state.losses(slice(N, None))
    twin = state.case.model()

    def exact(train: Any = train, validation: Any = validation, clip_factor: float = 1.0) -> ExactValues:
        return state.engine.exact_values([train], validation, clip_factor=clip_factor, global_rows=N)

    for clip_factor in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="at most 1"):
            exact(clip_factor=clip_factor)
    for losses in (lambda: validation().detach(), lambda: state.case.losses(twin, state.x, state.y)):
        with pytest.raises(RuntimeError, match="the validation losses have no derivative"):
            exact(validation=losses)
    for which in ("train", "validation"):
        with pytest.raises(ValueError, match=r"one loss per sample, \(n,\); got shape \(\)"):
            exact(**{which: lambda: train().mean()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exact values of no rows"):
        state.engine.exact_values([], validation, clip_factor=1.0, global_rows=N)
    with pytest.raises(ValueError, match=f"of this process alone, and global_rows={N - 1}"):
        state.engine.exact_values([train], validation, clip_factor=1.0, global_rows=N - 1, whole_batch=False)
    next(state.model.parameters()).grad[0] = torch.inf
    with pytest.raises(ValueError, match="is not finite"):
        exact()
    state.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient"):
        exact()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * backprops[0]


def test_an_operation_without_a_forward_mode_derivative() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"forward-mode derivative of each operation.*jvp"):
        directional_derivatives(
            model, {"weight": torch.ones(2, 2)}, lambda: Cube.apply(model(torch.ones(3, 2))).sum(1)
        )
