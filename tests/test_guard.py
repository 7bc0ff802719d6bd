"""The guard: models on which a per-sample score would mean nothing are errors at the first step."""

import random
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, Case, D, T, V, Wired, joint_step, seeded, token_rows
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.oracle import per_sample
from ghostEngines import GradDotProdEngine, RowsError, per_sample_losses
from ghostEngines.guard import halves, separating_halves

N, M = 3, 2


class Table(nn.Module):
    """A table of positions by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, D))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.weight[: h.shape[1]]


def first_step(
    run: Callable, between: Callable[[], nn.Module] = lambda: nn.Linear(D, D), rows: int = N + M
) -> None:
    joint_step(seeded(lambda: Wired(run, between)), *token_rows(rows), M)


# Rows


def over_the_batch(m: Wired, h: Tensor) -> Tensor:
    return m.out(m.lin(h) - m.lin(h).mean(0, keepdim=True).detach() * 0 - h.mean(0, keepdim=True))


def reordered(m: Wired, h: Tensor) -> Tensor:
    """Rows sorted by what they hold, and put back after the layer."""
    order = h[:, 0, 0].argsort(descending=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(h))
    return m.out(m.lin(h[order])[back])


def gathered(m: Wired, h: Tensor) -> Tensor:
    """Tokens for an expert, as many as there are rows by chance."""
    flat = h.flatten(0, 1)
    some = flat[:, 0].argsort()[: len(h)]
    return m.out(h + torch.zeros_like(flat).index_copy(0, some, m.lin(flat[some])).view_as(h))


def queries(m: Wired, h: Tensor) -> Tensor:
    """Learned queries, as many as there are rows by chance."""
    made = m.lin(torch.eye(len(h), D, dtype=h.dtype))
    return m.out(h + (h @ made.T).softmax(-1) @ made)


MIXING = {
    "statistics over the batch": over_the_batch,
    "rows reordered": reordered,
    "tokens gathered for an expert": gathered,
    "learned queries": queries,
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_are_not_what_they_are_taken_for(name: str) -> None:
    with pytest.raises(
        RowsError, match="the loss of a row has a gradient at other rows of the output of layer"
    ):
        first_step(MIXING[name])


def test_images_in_another_order_than_rows() -> None:
    """Two images of each row, all first ones before all second ones: image k is not that of row k // 2."""
    with pytest.raises(RowsError, match="several entries belong to one row"):
        first_step(lambda m, h: m.out(h + m.lin(torch.cat([h, h.flip(1)])).view(2, *h.shape).sum(0)))


def test_a_contrastive_loss() -> None:
    model, (x, y) = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)))), token_rows()

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        states = model(x).mean(1)
        return F.cross_entropy(states @ states.T, torch.arange(len(x)), reduction="none")

    with pytest.raises(RowsError, match="a contrastive loss"):
        joint_step(model, x, y, M, losses)


def test_the_guard_can_be_switched_off_by_name() -> None:
    dots, _ = joint_step(seeded(lambda: Wired(over_the_batch)), *token_rows(), M, guard=False)
    assert dots.shape == (N,)


@pytest.mark.parametrize("rows", range(2, 20))
def test_halves(rows: int) -> None:
    half, other = halves(rows)
    assert half.any() and other.any() and torch.equal(half, ~other)
    separated = torch.zeros(rows, rows, dtype=torch.bool)
    for mask in separating_halves(rows):
        separated |= mask[:, None] & ~mask[None]
    assert (separated | torch.eye(rows, dtype=torch.bool)).all()


# Terms beside the rows' losses


@pytest.mark.parametrize("name", ["gpt2-tied", "fused-gpt2-tied"])
def test_another_term_beside_the_joint_loss(name: str) -> None:
    """A z-loss, load balancing of experts, a regulariser of activations."""
    case = BY_NAME[name]
    model = case.model()
    seen: list[Tensor] = []
    block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    with GradDotProdEngine(model, M) as engine:
        losses = case.losses(model, *case.data(N + M))
        (engine.joint_loss(losses) + 1e-2 * seen[-1].square().mean()).backward()
        with pytest.raises(RowsError, match=r"is not that of engine\.joint_loss"):
            engine.prepare_gradients()


def test_a_layer_that_only_another_term_reaches() -> None:
    """An auxiliary output: the rows' losses do not depend on it at all."""
    model, (x, y), seen = (
        seeded(lambda: Wired(lambda m, h: m.out(h) + 0 * m.lin(h).detach().sum())),
        token_rows(),
        [],
    )
    model.lin.register_forward_hook(lambda module, args, output: seen.append(output))
    with GradDotProdEngine(model, M) as engine:
        loss = engine.joint_loss(per_sample_losses(model, x, y))
        (loss + 1e-2 * seen[-1].square().mean()).backward()
        with pytest.raises(RowsError, match=r"layer 'lin' is not that of engine\.joint_loss"):
            engine.prepare_gradients()


# Randomness


def layer_drop(draw: Callable[[], float]) -> Callable:
    return lambda m, h: m.out(h if draw() < 0.0 else m.lin(h))


RANDOM = {
    "F.dropout": lambda m, h: m.out(F.dropout(m.lin(h), 0.1)),
    "dropout of an attention": lambda m, h: m.out(
        F.scaled_dot_product_attention(h, h, m.lin(h), dropout_p=0.1)
    ),
    "noise": lambda m, h: m.out(m.lin(h + torch.randn_like(h))),
    "layer drop, torch": layer_drop(lambda: torch.rand(()).item()),
    "layer drop, python": layer_drop(random.random),
    "layer drop, numpy": layer_drop(np.random.rand),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_in_the_forward_pass(name: str) -> None:
    with pytest.raises(RowsError, match="drew random numbers"):
        first_step(RANDOM[name])


def test_dropout_in_eval_mode_is_none() -> None:
    model = seeded(
        lambda: Wired(lambda m, h: m.out(m.lin(h)), lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)))
    )
    model.eval()
    truth = per_sample(deepcopy(model), lambda m, x: m(x), *token_rows(), N)
    dots, _ = joint_step(model, *token_rows(), M)
    assert truth.dot_error(dots) < 1e-12
    with pytest.raises(ValueError, match=r"drops out with p=0\.5"):
        joint_step(model.train(), *token_rows(), M)


# What is read besides its layer's call, and what autograd does not see


class ReadsTheEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.lin = embedding, nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.lin(h) + 0.1 * ((h @ self.embedding.weight.T) @ self.embedding.weight)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("compiled_eagerly")
def test_a_weight_that_is_read_besides_its_layers_call(compiled: bool) -> None:
    """A compiled graph is one node, which tells nothing of what is in it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.out = nn.Embedding(V, D), nn.Linear(D, V)
            self.block = ReadsTheEmbedding(self.wte)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.block(self.wte(x)))

    model = seeded(Model)
    if compiled:
        model.block.compile()
    with pytest.raises(
        RuntimeError, match=r"the weight of layer '(wte|block\.embedding)' was used in another way"
    ):
        joint_step(model, *token_rows(), M)


@pytest.mark.usefixtures("compiled_eagerly")
def test_parameters_by_themselves_in_compiled_code() -> None:
    """Refused at the first step, which is not compiled."""
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), lambda: nn.Sequential(Table())))
    model.lin.compile()
    with pytest.raises(RuntimeError, match=r"module 'lin\.0' of type Table lies in compiled code"):
        joint_step(model, *token_rows(), M)


def test_a_norms_output_that_is_changed_behind_autograds_back() -> None:
    def run(m: Wired, h: Tensor) -> Tensor:
        normed = m.lin(h)
        normed.data.mul_(2)
        return m.out(normed)

    with pytest.raises(RuntimeError, match=r"changed in a way that autograd does not see \(through \.data\)"):
        first_step(run, lambda: nn.LayerNorm(D))


def test_a_norm_that_does_something_else_in_the_model() -> None:
    class Moody(nn.Module):
        """A norm on what is small."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return normed * self.weight * (1 if x.dim() < 4 else 2)

    first_step(lambda m, h: m.out(m.lin(h)), Moody)
    with pytest.raises(RuntimeError, match="does not do with its input what it did with the random ones"):
        first_step(lambda m, h: m.out(m.lin(h[:, None])[:, 0]), Moody)


# Micro-batches


def micro_batches(
    count: int, factor: float = 1.0, **attach: Any
) -> tuple[nn.Module, GradDotProdEngine, Callable]:
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h))))
    engine = GradDotProdEngine(model, 1, micro_batches=count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer if attach.pop("optimizer", True) else None, **attach)
    x, y = token_rows(6)

    def run(rows: list[int]) -> None:
        (factor * engine.joint_loss(per_sample_losses(model, x[rows], y[rows]))).backward()
        engine.prepare_gradients()

    return model, engine, lambda rows=None: optimizer.step() if rows is None else run(rows)


def test_an_optimizer_step_after_too_few_micro_batches() -> None:
    """An epoch's remainder: the gradient would be that of two micro-batches, divided by three."""
    model, engine, go = micro_batches(3)
    before = deepcopy(model.state_dict())
    go([0, 1, 5])
    go([2, 3])
    with pytest.raises(RuntimeError, match="the optimizer steps after 2 of 3 micro-batches"):
        go()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad()
    engine.forget_micro_batches()
    for rows in ([0, 1, 5], [2, 3], [1, 2]):
        go(rows)
    go()


def test_parameters_that_change_between_micro_batches() -> None:
    """The engine was not told of the optimizer; autograd counts the changes."""
    _, _, go = micro_batches(3, optimizer=False)
    go([0, 1, 5])
    go()
    with pytest.raises(RuntimeError, match="the parameters were changed after 1 of 3 micro-batches"):
        go([2, 3])


@pytest.mark.parametrize(
    "loss_scale",
    [None, 0.5, lambda: 0.5, lambda: torch.tensor(0.5)],
    ids=["none", "number", "function", "tensor"],
)
def test_a_loop_that_divides_by_the_micro_batches_too(loss_scale) -> None:
    """As accelerate does: training would be another."""
    _, _, go = micro_batches(2, 0.5, loss_scale=loss_scale)
    if loss_scale is None:
        with pytest.raises(ValueError, match=r"divided by the \d micro-batches"):
            go([0, 1, 5])
    else:
        go([0, 1, 5])
        go([2, 3])
        go()


# The inputs of a model


class TakesMuch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.out = nn.Embedding(V, D), nn.Embedding(T, D), nn.Linear(D, V)

    def forward(
        self, position_ids: Tensor, scale: Tensor | None = None, tokens: Tensor | None = None, batch=None
    ) -> Tensor:
        x = tokens if tokens is not None else batch["input_ids"]
        return self.out(self.wte(x) + self.wpe(position_ids))


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        (lambda x: {"scale": torch.tensor(2.0), "tokens": x}, "tokens"),
        (lambda x: {"batch": {"input_ids": x}}, None),
        (lambda x: {"batch": {"input_ids": x, "pixel_values": torch.zeros(12, 3)}}, None),
        (lambda x: {"tokens": x}, None),
        (lambda x: {"tokens": x}, "input_ids"),
    ],
    ids=["named", "a dictionary", "with images", "not to be told", "named wrongly"],
)
def test_which_input_has_the_rows(inputs: Callable, rows: str | None) -> None:
    model, (x, y) = seeded(TakesMuch), token_rows()
    positions = torch.arange(T)[None]
    given = inputs(x)

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return per_sample_losses(lambda x: model(positions, **given), x, y)

    if "tokens" in given and rows != "tokens":
        with pytest.raises(ValueError, match=r"have different first dimensions|without such a tensor"):
            joint_step(model, x, y, M, losses, rows=rows)
        return
    truth = per_sample(deepcopy(model), lambda m, x: m(positions, tokens=x), x, y, N)
    dots, _ = joint_step(model, x, y, M, losses, rows=rows)
    assert truth.dot_error(dots) < 1e-12


# No false alarm, and no trace


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_changed_by_the_guard(case: Case) -> None:
    """Bit for bit: losses, dot products, gradients, and the states of the random number generators."""
    results = []
    for guard in (True, False):
        torch.manual_seed(5)
        model = case.model()
        dots, losses = joint_step(model, *case.data(N + M), M, case.losses, guard=guard)
        results.append([dots, losses, torch.get_rng_state(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


CHANCE = {
    "a table": (lambda m, h: m.out(m.lin(h)), Table),
    "a layer on constants": (
        lambda m, h: m.out(h + m.lin(torch.ones(h.shape[1], D, dtype=h.dtype))), lambda: nn.Linear(D, D)
    ),
    "the sequence first": (
        lambda m, h: m.out(m.lin(h.transpose(0, 1)).transpose(0, 1)), lambda: nn.Linear(D, D)
    ),
}  # fmt: skip


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("name", CHANCE)
def test_another_number_of_rows_is_guarded_too(name: str, micro: int) -> None:
    """With another number of rows a dimension may be as long as the batch by chance: exact, or an error."""
    run, between = CHANCE[name]
    model, (x, y) = seeded(lambda: Wired(run, between)), token_rows(6, 4)
    truth = per_sample(deepcopy(model), lambda m, x: m(x), x[[0, 1, 2, 3, 5]], y[[0, 1, 2, 3, 5]], 4)
    engine = GradDotProdEngine(model, 1, micro_batches=micro)
    engine.attach()
    passes = [[0, 1, 2, 3, 5], [0, 1, 2, 5]] if micro == 1 else [[0, 1, 2, 3, 5], [0, 1, 2, 3]]

    def dots(rows: list[int]) -> Tensor:
        model.zero_grad()
        engine.joint_loss(per_sample_losses(model, x[rows], y[rows])).backward()
        engine.prepare_gradients()
        return engine.dot_products()

    assert (dots(passes[0]) - truth.dots()).abs().max() < 1e-10
    with suppress(RowsError):
        later = dots(passes[1])
        assert (later - truth.dots()[: len(later)]).abs().max() < 1e-10


def test_a_head_that_alone_trains() -> None:
    case = BY_NAME["fused-gpt2-untied"]
    models = [case.model(), case.model()]
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_("lm_head" in name)
    truth = per_sample(models[0], case.logits, *case.data(N + M), N)
    dots, _ = joint_step(models[1], *case.data(N + M), M, case.losses)
    assert truth.dot_error(dots) < 1e-12


def test_the_guard_looks_once() -> None:
    case = BY_NAME["fused-gpt2-tied"]
    model, ran = case.model(), []
    model.hf.transformer.ln_f.register_forward_hook(lambda *_: ran.append(1))
    engine = GradDotProdEngine(model, M)
    engine.attach()
    for step in range(3):
        engine.joint_loss(case.losses(model, *case.data(N + M, step))).backward()
        engine.prepare_gradients()
        assert len(ran) == 3 + step
