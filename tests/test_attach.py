"""While the engine is attached the model computes what it always did; detached, it is exactly what it was."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case, D, V, Wired, copy_in, gradient_of, joint_step, mlp
from torch import Tensor, nn

from ghostEngines import GradDotProdEngine

MODELS = [case.name for case in CASES if "gpt2" in case.name]


def remembered(model: nn.Module) -> dict[str, Any]:
    """Everything that the modules and parameters of a model carry, by identity where it can't be compared."""
    memory: dict[str, Any] = {}
    for name, module in model.named_modules():
        memory[f"{name} type"] = type(module)
        for key, value in vars(module).items():
            copied = OrderedDict(value) if isinstance(value, dict) else id(value)
            memory[f"{name}.{key}"] = (
                copied if key not in ("_parameters", "_buffers") else list(map(id, value.values()))
            )
        memory[f"{name} forward"] = module.forward.__func__
        memory[f"{name} attributes"] = list(vars(module))
    for name, p in model.named_parameters():
        hooks = (p._backward_hooks, p._post_accumulate_grad_hooks)
        memory[f"{name} parameter"] = (id(p), p.requires_grad, p.dtype, p._version, vars(p).copy(), hooks)
    return memory


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, memory: dict[str, Any], state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return (
        remembered(model) == memory
        and list(now) == list(state)
        and all(map(torch.equal, now.values(), state.values()))
    )


def with_hooks(case: Case) -> nn.Module:
    """A model that has hooks of its own and a frozen parameter."""
    model = case.model()
    model.register_forward_hook(lambda *_: None)
    first = next(module for module in model.modules() if list(module.parameters(recurse=False)))
    first.register_forward_pre_hook(lambda *_: None)
    first.register_full_backward_hook(lambda *_: None)
    list(model.parameters())[-2].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_nothing_is_left(name: str) -> None:
    case = BY_NAME[name]
    for model in (case.model(), with_hooks(case)):
        memory, state = remembered(model), values(model)
        engine = GradDotProdEngine(model, val_batch_size=2)
        engine.attach()
        assert not same(model, memory, state)  # the comparison does see the engine
        assert list(model.state_dict()) == list(state)
        engine.detach()
        assert same(model, memory, state)
        joint_step(model, *case.data(5), 2, case.losses)
        assert same(model, memory, state)


class Stop(Exception):
    """Raised on purpose."""


def failing_steps(model: nn.Module, case: Case) -> list[Callable[[GradDotProdEngine], None]]:
    x, y = case.data(5)

    def at_once(engine: GradDotProdEngine) -> None:
        raise Stop

    def in_forward(engine: GradDotProdEngine) -> None:
        handle = next(iter(model.modules())).register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop))
        try:
            case.losses(model, x, y)
        finally:
            handle.remove()

    def before_backward(engine: GradDotProdEngine) -> None:
        engine.joint_loss(case.losses(model, x, y))
        raise Stop

    def in_backward(engine: GradDotProdEngine) -> None:
        losses = case.losses(model, x, y)
        losses.register_hook(lambda _: (_ for _ in ()).throw(Stop))
        engine.joint_loss(losses).backward()

    return [at_once, in_forward, before_backward, in_backward]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fails", range(4), ids=["at once", "in forward", "before backward", "in backward"])
def test_nothing_is_left_after_an_exception(name: str, fails: int) -> None:
    case = BY_NAME[name]
    model = with_hooks(case)
    memory, state = remembered(model), values(model)
    with pytest.raises(Stop), GradDotProdEngine(model, val_batch_size=2) as engine:
        failing_steps(model, case)[fails](engine)
    assert same(model, memory, state)


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), layer, nn.Linear(D, V))


def shared_with_a_norm() -> nn.Module:
    """A norm's weight with a row of lookups."""
    model = Wired(lambda m, h: m.out(m.lin(h)), lambda: nn.LayerNorm((V, D)))
    model.lin.weight = model.wte.weight
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sparse": (lambda: between(nn.Embedding(V, D, sparse=True)), "sparse"),
    "max_norm": (lambda: between(nn.Embedding(V, D, max_norm=1.0)), "max_norm"),
    "by frequency": (lambda: between(nn.Embedding(V, D, scale_grad_by_freq=True)), "scale_grad_by_freq"),
    "dropout": (lambda: between(nn.Dropout(0.1)), r"'2' drops out with p=0\.1"),
    "alpha dropout": (lambda: between(nn.AlphaDropout(0.1)), r"'2' drops out with p=0\.1"),
    "dropout of channels": (lambda: between(nn.Dropout1d(0.1)), r"'2' drops out with p=0\.1"),
    "batch norm": (lambda: between(nn.BatchNorm1d(D)), "'2' of type BatchNorm1d normalises over the batch"),
    "batch norm alone": (
        lambda: between(nn.BatchNorm1d(D, affine=False)), "'2' of type BatchNorm1d normalises over the batch"
    ),
    "shared": (shared_with_a_norm, r"wte\.weight and lin\.weight are one parameter"),
    "nothing trains": (lambda: mlp(True).requires_grad_(False), "no trainable parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_attach_refuses(name: str) -> None:
    """And leaves as it was."""
    build, said = REFUSED[name]
    model = build()
    memory, state = remembered(model), values(model)
    with pytest.raises(ValueError, match=said):
        GradDotProdEngine(model, val_batch_size=2).attach()
    assert same(model, memory, state)


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.AlphaDropout, nn.Dropout1d])
def test_dropout_of_nothing(dropout: Callable[[float], nn.Module]) -> None:
    with GradDotProdEngine(between(dropout(0.0)), val_batch_size=2):
        pass


def test_the_optimizer_must_train_what_is_scored() -> None:
    model = mlp(True)
    some = [p for name, p in model.named_parameters() if name != "2.bias"]
    foreign = nn.Parameter(torch.zeros(1))
    memory, state = remembered(model), values(model)
    engine = GradDotProdEngine(model, val_batch_size=2)
    with pytest.raises(ValueError, match=r"does not update 2\.bias"):
        engine.attach(torch.optim.SGD(some, lr=0.1))
    with pytest.raises(ValueError, match="1 trainable parameters that are not in the model"):
        engine.attach(torch.optim.SGD([*model.parameters(), foreign], lr=0.1))
    assert same(model, memory, state)
    foreign.requires_grad_(False)
    model.get_parameter("2.bias").requires_grad_(False)
    engine.attach(torch.optim.SGD([*some, foreign], lr=0.1))  # the attempts did not count
    engine.detach()


def test_attached_once() -> None:
    model = BY_NAME["gpt2-tied"].model()
    engine = GradDotProdEngine(model, val_batch_size=2)
    with pytest.raises(RuntimeError, match="not attached"):
        engine.detach()
    engine.attach()
    memory = remembered_but_for_forward(model)
    with pytest.raises(RuntimeError, match="attached already"):
        engine.attach()
    with pytest.raises(ValueError, match="overridden on the instance"):
        GradDotProdEngine(model, val_batch_size=1).attach()
    assert remembered_but_for_forward(model) == memory
    engine.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        engine.detach()


def remembered_but_for_forward(model: nn.Module) -> list[tuple[str, list[str], list[int]]]:
    """Attribute names and hooks of an attached model."""
    return [
        (name, list(vars(m)), [*m._forward_pre_hooks, *m._forward_hooks]) for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_two_engines_in_turn(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    first, second = (
        GradDotProdEngine(model, val_batch_size=2),
        GradDotProdEngine(model, val_batch_size=3, granularity="pairwise"),
    )
    x, y = case.data(5)
    for engine, m in ((first, 2), (second, 3), (first, 2)):
        model.zero_grad()
        with engine:
            engine.joint_loss(case.losses(model, x, y)).backward()
            engine.prepare_gradients()
            dots = engine.dot_products()
        truth = case.truth(5 - m, m)
        assert (truth.pairwise_error(dots) if m == 3 else truth.dot_error(dots)) < 1e-10
        assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_while_detached(name: str) -> None:
    """Same numbers, any number of rows, and plain gradients."""
    case = BY_NAME[name]
    model, untouched = case.model(), case.model()
    engine = GradDotProdEngine(model, val_batch_size=2)
    engine.attach()
    engine.joint_loss(case.losses(model, *case.data(5))).backward()
    model.zero_grad()
    engine.detach()
    for rows in (1, 4):
        losses, want = (case.losses(m, *case.data(rows)) for m in (model, untouched))
        assert torch.equal(losses, want)
        losses.mean().backward()
        want.mean().backward()
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(gradient_of(p), gradient_of(q))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_outputs_are_those_of_the_untouched_model(name: str, autocast: bool, dtype: torch.dtype) -> None:
    """To the last bit, with gradients and without, the outputs and every module's output on the way."""
    case = BY_NAME[name]
    model, (x, y) = copy_in(case.model(), dtype).train(), case.data(8)
    x = x.to(dtype) if x.is_floating_point() else x
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output)

    for module in model.modules():
        module.register_forward_hook(see)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        untouched = case.losses(model, x, y)
        want, seen[:] = list(seen), []
        with torch.no_grad():
            plainly_evaluated = case.losses(model, x, y)
        seen.clear()
        with GradDotProdEngine(model, val_batch_size=3, guard=False):  # which calls the model, too
            attached = case.losses(model, x, y)
            got, seen[:] = list(seen), []
            with torch.no_grad():
                evaluated = case.losses(model, x, y)
    # With an input that is not contiguous, PyTorch multiplies in another way where a weight needs no
    # gradient.
    same = torch.equal if "convolution" not in name else partial(torch.allclose, atol=1e-6)
    assert same(attached, untouched)
    assert torch.equal(evaluated, plainly_evaluated)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert same(a, b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_for_inputs_that_are_not_contiguous(dtype: torch.dtype, bias: bool) -> None:
    model = nn.Linear(64, 96, bias=bias).to(dtype)
    x = torch.randn(5, 64, 33, generator=torch.Generator().manual_seed(0)).to(dtype).mT
    want = model(x)
    with GradDotProdEngine(nn.Sequential(model), val_batch_size=2) as engine:
        assert torch.equal(engine.model(x), want)


def test_the_engine_does_not_keep_a_step_alive() -> None:
    """Detached, it holds no tensor of its last step."""
    model = BY_NAME["gpt2-tied"].model()
    engine = GradDotProdEngine(model, val_batch_size=2)
    with suppress(Stop), engine:
        engine.joint_loss(BY_NAME["gpt2-tied"].losses(model, *BY_NAME["gpt2-tied"].data(5))).backward()
        raise Stop
    with pytest.raises(RuntimeError, match="no forward pass"):
        engine.joint_loss(torch.zeros(5))
    with pytest.raises(RuntimeError, match="no forward pass"):
        engine.prepare_gradients()
    with pytest.raises(RuntimeError):
        engine.dot_products()
