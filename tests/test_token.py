"""Scores by position of the model's input, against weights of which every position has a copy of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    Case,
    D,
    T,
    Transposed,
    V,
    Wired,
    copy_in,
    joint_step,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from benchmarks.oracle import row_loss
from ghostEngines import AttachError, CrossEntropyHead, GradDotProdEngine, per_sample_losses, register_unit
from ghostEngines.layer_rules.units import UNITS

N, M = 4, 2
REFUSED = {
    "linear-2d": "at no positions of each row, and the model's input has 8",
    "conv1d-2d": "at no positions",
    "layer-norm-2d": "at no positions",
    "layer-norm-two-dimensions": "at no positions of each row, and the model's input has 6",
    "convolution": "'2.layer.weight' is known by row only",  # in groups
    "convolution-2d": r"'0.layer.\w+' is used at 18 positions of each row, and the model's input has 2",
    "embedding-1d": r"needs an input \(rows, positions, ...\), and the model's is \(6,\)",
}
COVERED = [case.name for case in CASES if case.name not in REFUSED]

# (module, input of one row, weight and bias with a dimension of positions in front) -> output
WITH_COPIES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor, Any], Tensor]] = {
    nn.Linear: lambda layer, x, w, b: linear(x, w, b),
    Conv1D: lambda layer, x, w, b: add(torch.einsum("bt...d,tdp->bt...p", x, w), b),
    nn.LayerNorm: lambda layer, x, w, b: add(F.layer_norm(x, layer.normalized_shape, eps=layer.eps) * w, b),
    nn.RMSNorm: lambda layer, x, w, b: F.rms_norm(x, layer.normalized_shape, eps=layer.eps) * w,
    nn.GroupNorm: lambda layer, x, w, b: F.group_norm(x, layer.num_groups, eps=layer.eps) * w.T + b.T,
    nn.Conv1d: lambda layer, x, w, b: (
        torch.einsum("bctk,tock->bot", F.pad(x, (1, 1)).unfold(2, 3, 1), w) + b.T
    ),
    nn.Embedding: lambda layer, x, w, b: looked_up(layer, x, w),
}


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if x.shape[1] != len(w):  # the heads come first
        return linear(x.movedim(2, 1), w, b).movedim(2, 1)
    return add(torch.einsum("bt...d,tpd->bt...p", x, w), b)


def add(y: Tensor, b: Tensor | None) -> Tensor:
    return y if b is None else y + b.view(len(b), *[1] * (y.dim() - 3), -1)


def looked_up(layer: nn.Embedding, x: Tensor, w: Tensor) -> Tensor:
    rows = w[torch.arange(len(w)), x[0]]
    padding = -1 if layer.padding_idx is None else layer.padding_idx
    return torch.where((x[0] == padding)[:, None], rows.detach(), rows)[None]


@contextmanager
def copies(model: nn.Module, positions: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Run every layer with a copy of its parameters for each position; yields (id of the parameter, copies)."""
    made: list[tuple[int, Tensor]] = []
    changed = [module for module in model.modules() if type(module) in WITH_COPIES]

    def forward(layer: Any, x: Tensor) -> Tensor:
        of_layer: list[Any] = []
        for parameter in (layer.weight, getattr(layer, "bias", None)):
            own = None if parameter is None else parameter.detach().repeat(positions, *[1] * parameter.dim())
            if own is not None:
                made.append((id(parameter), own.requires_grad_()))
            of_layer.append(own)
        return WITH_COPIES[type(layer)](layer, x, *of_layer)

    for module in changed:
        module.forward = partial(forward, module)  # type: ignore[method-assign]
    try:
        yield made
    finally:
        for module in changed:
            del module.forward


def by_copies(
    model: nn.Module, logits: Callable[[Any, Tensor], Tensor], x: Tensor, y: Tensor, positions: int
) -> tuple[list[Tensor], list[nn.Parameter]]:
    """What each position adds to each row's gradient, (rows, positions, *shape) for each parameter."""
    parameters = list(model.parameters())
    found = [torch.zeros(len(x), positions, *p.shape, dtype=p.dtype) for p in parameters]
    place = {id(p): i for i, p in enumerate(parameters)}
    for row in range(len(x)):
        with copies(model, positions) as made:
            own = logits(model, x[row : row + 1])
            loss = row_loss(own.reshape(-1, own.shape[-1]), y[row].reshape(-1))
        gradients = torch.autograd.grad(loss, [each for _, each in made], allow_unused=True)
        for (parameter, _), gradient in zip(made, gradients, strict=True):
            if gradient is not None:
                found[place[parameter]][row] += gradient
    return found, parameters


def products(parts: list[Tensor], directions: list[Tensor]) -> tuple[Tensor, float]:
    """<part, direction> (rows, positions), and the scale of its errors."""
    flat = torch.cat([each.flatten(2) for each in parts], 2)
    direction = torch.cat([each.flatten() for each in directions])
    return flat @ direction, flat.sum(1).norm(dim=1).max().item() * direction.norm().item()


def oracle(case: Case, x: Tensor, y: Tensor) -> list[Tensor]:
    """The parts of a case's rows. A fused head is a product for it."""
    model, logits = case.model(), case.logits
    if "fused-gpt2" in case.name:
        plain = seeded(lambda: tiny_gpt2("untied" not in case.name))
        plain.load_state_dict(model.hf.state_dict())
        model, logits = plain, lambda model, x: model(x).logits
    if case.name == "fused-head":
        head = nn.Linear(D, V, bias=False).double()
        head.weight = model.head.weight
        model, logits = nn.Sequential(model.inner, nn.Tanh(), head), lambda model, x: model(x)
    return by_copies(model, logits, x, y, x.shape[1])[0]


def truth(case: Case, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, float]:
    parts = oracle(case, x, y)
    return products([each[:n] for each in parts], [each[n:].sum(1).mean(0) for each in parts])


@pytest.mark.parametrize("strategy", [None, "gram", "project"])
@pytest.mark.parametrize("name", COVERED)
def test_every_case(name: str, strategy: str | None) -> None:
    case = BY_NAME[name]
    model, (x, y) = case.model(), case.data(N + M)
    want, scale = truth(case, x, y, N)
    total = case.truth(N, M)
    dots, _ = joint_step(model, x, y, M, case.losses, strategy=strategy, granularity="token")
    assert dots.shape == (N, x.shape[1])
    assert (dots - want).abs().max() < 1e-10 * scale
    assert total.dot_error(dots.sum(1)) < 1e-10 and total.gradient_error(model) < 1e-10


@pytest.mark.parametrize("name", REFUSED)
def test_cases_that_are_refused(name: str) -> None:
    case = BY_NAME[name]
    with pytest.raises((RuntimeError, ValueError), match=f"granularity 'token'.*{REFUSED[name]}"):
        joint_step(case.model(), *case.data(N + M), M, case.losses, granularity="token")


@pytest.mark.parametrize("part", [2 * T + 1, T - 1])
@pytest.mark.parametrize("strategy", ["gram", "project"])
def test_the_head_in_parts(part: int, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostEngines.layer_rules.cross_entropy_head.PART_POSITIONS", part)
    test_every_case("fused-gpt2-tied-padded", strategy)


class Shared(nn.Module):
    """A layer and a norm that run twice, with heads between, and an output layer that is also looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.lin, self.norm = nn.Embedding(V, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.of_head, self.out = nn.Linear(D // 2, D // 2), nn.Linear(D, V)
        self.out.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wte(x) + self.wte((x + 1) % V)
        for _ in range(2):
            hidden = self.norm(self.lin(hidden)).tanh()
        heads = hidden.unflatten(-1, (2, -1))
        hidden = hidden + self.of_head(heads).flatten(-2)
        hidden = hidden + self.of_head(heads.movedim(2, 1)).movedim(1, 2).flatten(-2)
        return self.out(hidden) + self.out(hidden.square())


def same_convolution() -> nn.Module:
    return nn.Sequential(
        Transposed(nn.Conv1d(D, D, 3, padding=1)), nn.Tanh(), Transposed(nn.GroupNorm(2, D)), nn.Linear(D, V)
    )


@pytest.mark.parametrize("strategy", ["gram", "project"])
@pytest.mark.parametrize("build", [Shared, same_convolution])
def test_uses(build: Callable[[], nn.Module], strategy: str) -> None:
    case = Case("", build, (), tokens=build is Shared)
    model, (x, y) = case.model(), case.data(N + M)
    want, scale = truth(case, x, y, N)
    dots, _ = joint_step(model, x, y, M, strategy=strategy, granularity="token")
    assert (dots - want).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("name", ["gpt2-tied", "fused-gpt2-tied-padded", "fused-gpt2-untied", "rms-norm"])
def test_micro_batches(name: str) -> None:
    case, micro = BY_NAME[name], 2
    model, (x, y) = case.model(), case.data(N * micro + M)
    want, scale = truth(case, x, y, N * micro)
    engine, dots = GradDotProdEngine(model, M, micro_batches=micro, granularity="token"), []
    with engine:
        for rows in ([*range(N), *range(N * micro, N * micro + M)], [*range(N, N * micro)]):
            engine.joint_loss(case.losses(model, x[rows], y[rows])).backward()
            engine.prepare_gradients()
            dots.append(engine.dot_products())
    assert (torch.cat(dots) - want).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("name", ["tied-linear", "fused-gpt2-tied-padded", "layer-norm"])
def test_a_direction_that_is_given(name: str) -> None:
    case = BY_NAME[name]
    model, (x, y) = case.model(), case.data(N)
    torch.manual_seed(5)
    direction = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    want, scale = products(oracle(case, x, y), list(direction.values()))
    with GradDotProdEngine(model, M, granularity="token") as engine:
        engine.use_direction(direction)
        engine.joint_loss(case.losses(model, x, y)).backward()
        engine.prepare_gradients()
        assert (engine.dot_products() - want).abs().max() < 1e-10 * scale
        with pytest.raises(AttachError, match="several directions with granularity='token'"):
            engine.use_direction({"a": direction, "b": direction})


@pytest.mark.parametrize("name", ["gpt2-tied", "fused-gpt2-tied-padded"])
def test_the_direction_of_adamw(name: str) -> None:
    """P, of the second moments after the first step, times the validation gradient."""
    case, eps = BY_NAME[name], 1e-3
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, eps=eps, weight_decay=0)
    engine = GradDotProdEngine(model, M, direction="auto", granularity="token")
    engine.attach(optimizer)
    for seed in (1, 2):
        x, y = case.data(N + M, seed)
        engine.joint_loss(case.losses(model, x, y)).backward()
        engine.prepare_gradients()
        dots = engine.dot_products()
        assert dots.shape == (N, T) and engine.scored == (seed == 2)
        if seed == 1:
            assert dots.isnan().all()
            optimizer.step()
            optimizer.zero_grad()
    parts, directions = oracle(case, x, y), []
    for each, p in zip(parts, model.parameters(), strict=True):
        v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999)
        directions.append(each[N:].sum(1).mean(0) / (v.sqrt() + eps) * 0.1 / (1 - 0.9**2))
    want, scale = products([each[:N] for each in parts], directions)
    assert (dots - want).abs().max() < 1e-8 * scale  # the parameters moved by 1e-12


def test_float32_autocast_and_checkpointing() -> None:
    """In bfloat16 a position's score is off by what its products are rounded; checkpointing changes nothing."""
    case = BY_NAME["gpt2-tied"]
    x, y = case.data(N + M)
    want, scale = truth(case, x, y, N)
    single, half = (copy_in(case.model(), torch.float32) for _ in range(2))
    dots, _ = joint_step(single, x, y, M, case.losses, granularity="token")
    assert dots.dtype == torch.float32 and (dots.double() - want).abs().max() < 1e-5 * scale
    half.gradient_checkpointing_enable({"use_reentrant": False})
    half.train()

    def losses(model: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.losses(model, x, y)

    rough, _ = joint_step(half, x, y, M, losses, granularity="token")
    assert rough.dtype == torch.float32 and (rough.double() - want).abs().max() < 5e-2 * scale


@pytest.mark.usefixtures("compiled_eagerly")
def test_compiled_blocks() -> None:
    """The first step is not compiled."""
    model, (x, y) = tiny_llama(), token_rows()

    def dots() -> list[Tensor]:
        with GradDotProdEngine(model, M, granularity="token") as engine:
            found = []
            for _ in range(2):
                model.zero_grad()
                engine.joint_loss(
                    per_sample_losses(lambda x: model(input_ids=x, use_cache=False), x, y)
                ).backward()
                engine.prepare_gradients()
                found.append(engine.dot_products())
        return found

    eager = dots()
    for layer in model.model.layers:
        layer.compile()
    for mine, want in zip(dots(), eager, strict=True):
        assert torch.allclose(mine, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


class Shift(nn.Module):
    """A parameter that is added by hand."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_a_parameter_without_a_layer() -> None:
    """Its copies are those of a bias."""
    model, (x, y) = (
        seeded(lambda: Wired(lambda m, hidden: m.out(m.lin(hidden)), lambda: Shift(D))),
        token_rows(),
    )
    twin = seeded(lambda: Wired(lambda m, hidden: m.out(m.lin(hidden)), lambda: nn.Linear(D, D)))
    twin.load_state_dict(model.state_dict(), strict=False)
    nn.init.eye_(twin.lin.weight), nn.init.zeros_(twin.lin.bias)
    n = len(x) - M
    parts, parameters = by_copies(twin, lambda m, x: m(x), x, y, T)
    kept = [each for each, p in zip(parts, parameters, strict=True) if p is not twin.lin.weight]
    want, scale = products([each[:n] for each in kept], [each[n:].sum(1).mean(0) for each in kept])
    dots, _ = joint_step(model, x, y, M, granularity="token")
    assert (dots - want).abs().max() < 1e-10 * scale


class Rerun(nn.Linear):
    """Taken as one layer."""


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(model: nn.Module, **options: Any) -> None:
        GradDotProdEngine(model, M, granularity="token", **options).attach()

    with pytest.raises(AttachError, match=r"strategy='instantiate'.* take one of gram, project"):
        attach(nn.Linear(D, V), strategy="instantiate")
    for options in ({"samples": lambda x: x[:, 0]}, {"row_maps": {"": lambda inputs, rows: None}}):
        with pytest.raises(AttachError, match="'token' with samples or row_maps"):
            attach(nn.Linear(D, V), **options)
    with pytest.raises(AttachError, match="several micro-batches"):
        attach(nn.Linear(D, V), strategy="gram", micro_batches=2)
    monkeypatch.setitem(UNITS, Rerun, None)
    register_unit(Rerun)
    with pytest.raises(AttachError, match=r"'0' \(Rerun\): such a module .* run again"):
        attach(nn.Sequential(Rerun(D, V)))

    def step(
        run: Callable[[Any, Tensor], Tensor], between: Callable[[], nn.Module] = lambda: Shift(T, D)
    ) -> None:
        joint_step(Wired(run, between).double(), *token_rows(), M, granularity="token")

    with pytest.raises(RuntimeError, match=r"'lin.shift' is known by row only"):
        step(lambda model, hidden: model.out(model.lin(hidden)))
    with pytest.raises(RuntimeError, match=r"'lin.\w+' is used at no positions of each row, and the model's"):
        step(lambda m, hidden: m.out(hidden + m.lin(hidden.mean(1))[:, None]), lambda: nn.Linear(D, D))
    with pytest.raises(RuntimeError, match=r"'lin.\w+' is used at 3 positions of each row"):
        step(
            lambda m, hidden: m.out(hidden + m.lin(hidden[:, :3]).mean(1, keepdim=True)),
            lambda: nn.Linear(D, D),
        )
    with pytest.raises(
        RuntimeError, match=r"'lin.\w+' is used at 6 x 6 places of each row, and it is unknown"
    ):
        step(
            lambda m, hidden: m.out(hidden + m.lin(hidden[:, None].repeat(1, T, 1, 1)).mean(1)),
            lambda: nn.Linear(D, D),
        )


def test_a_head_of_other_positions() -> None:
    class Shorter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = nn.Embedding(V, D), CrossEntropyHead(D, V)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.wte(x)[:, 1:], y[:, 1:])

    model, (x, y) = Shorter(), token_rows()
    engine = GradDotProdEngine(model, M, granularity="token")
    engine.attach()
    with pytest.raises(RuntimeError, match=r"'head.weight' is used at 5 positions of each row"):
        model(x, y)
