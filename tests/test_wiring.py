"""Ways to wire a model: what the engine takes is exact, and what it cannot take is an error."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from cases import BY_NAME, D, T, V, Wired, exact, gradient_of, joint_step, seeded, token_rows
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.oracle import per_sample
from ghostEngines import GradDotProdEngine, RowsError, per_sample_losses

# The first dimension of a layer's input


@pytest.mark.parametrize("rows", [5, T, 3])
@pytest.mark.parametrize(
    "run",
    [
        lambda m, h: m.out(m.lin(h).tanh()),
        lambda m, h: m.out(m.lin(h.flatten(0, 1)).view(h.shape)),  # (N·T, D)
        lambda m, h: m.out(h + m.lin(torch.ones(D, dtype=h.dtype))),  # (D,)
        lambda m, h: m.out(h * m.lin(torch.ones(1, D, dtype=h.dtype)).tanh()),  # (1, D)
        lambda m, h: m.out(m.lin(h.repeat_interleave(2, 0)).view(len(h), 2, *h.shape[1:]).sum(1)),
    ],
    ids=["the sample", "flattened", "a vector for all", "a factor for all", "two entries for a row"],
)
def test_the_first_dimension_of_a_layers_input(run: Callable, rows: int) -> None:
    assert exact(seeded(lambda: Wired(run)), rows)


@pytest.mark.parametrize("rows", [5, T, 3])
def test_the_sequence_first(rows: int) -> None:
    """(T, N, D): with a number of rows that divides T its entries could be rows in order, which they are not."""
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h.transpose(0, 1)).transpose(0, 1))))
    if T % rows == 0:
        with pytest.raises(RowsError, match="at other rows of the output of layer 'lin'"):
            exact(model, rows)
    else:
        assert exact(model, rows)


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=f"with {rows} rows, the last 2"):
        joint_step(BY_NAME["gpt2-tied"].model(), *token_rows(rows), 2)


def test_an_input_without_a_number_of_rows() -> None:
    model = Wired(lambda m, h: m.out(h))
    with GradDotProdEngine(model, 2), pytest.raises(ValueError, match="without a tensor"):
        model([[1, 2], [3, 4], [5, 6]])
    with GradDotProdEngine(model, 2), pytest.raises(ValueError, match="row"):
        model(torch.tensor(1))


# What prepare_gradients refuses


@pytest.mark.parametrize(
    "run",
    [
        lambda m, h: m.out(F.linear(h, m.lin.weight, m.lin.bias)),
        lambda m, h: m.out(F.linear(m.lin(h), m.lin.weight)),
        lambda m, h: m.out(m.lin(h) + m.lin.bias),
        lambda m, h: F.linear(m.lin(h), m.wte.weight),
        lambda m, h: m.out(h) + 0 * m.lin(h).sum() + m.lin.weight.square().mean(),
    ],
    ids=[
        "weight read",
        "called and read",
        "called and bias read",
        "tied by hand",
        "regulariser inside",
    ],
)
def test_a_weight_is_used_by_one_call_of_its_layer(run: Callable) -> None:
    """Whatever the model does with a weight beside calling its layer once would be in p.grad, for the
    validation rows too, and not in the dot products."""
    with pytest.raises(RuntimeError, match=r"layer '(lin|wte)'"):
        joint_step(seeded(lambda: Wired(run)), *token_rows(), 2)


def test_a_layer_that_is_not_used_is_no_error() -> None:
    model = seeded(lambda: Wired(lambda m, h: m.out(h)))
    assert exact(model)
    assert model.lin.weight.grad is None


# Shapes that could be taken for others


POSITIONS = {
    "(T,)": lambda m: m.lin(torch.arange(T)),
    "(1, T)": lambda m: m.lin(torch.arange(T)[None]),
    "(1, T)[0]": lambda m: m.lin(torch.arange(T)[None])[0],
    "(1, T).sum(0)": lambda m: m.lin(torch.arange(T)[None]).sum(0),
    "a function of them": lambda m: m.lin(torch.arange(T)).tanh()[None],
    "(1,)": lambda m: m.lin(torch.tensor([0])),
    "()": lambda m: m.lin(torch.tensor(0)),
    "two lookups": lambda m: m.lin(torch.arange(T)) + m.lin(torch.tensor([1])),
}


@pytest.mark.parametrize("rows", [5, T, 3])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_without_a_sample_dimension(name: str, rows: int) -> None:
    """With as many positions as rows, ids (T,) look like one id for each row."""
    model = seeded(lambda: Wired(lambda m, h: m.out(h + POSITIONS[name](m)), lambda: nn.Embedding(T, D)))
    if rows == T and name in ("(T,)", "a function of them", "two lookups"):
        with pytest.raises(ValueError, match="layer 'lin'"):
            exact(model, rows)
    else:
        assert exact(model, rows)


def test_relative_positions() -> None:
    """A table (T, T) of relative positions, looked up once for all rows; with T rows it is an error."""

    def run(m: Wired, h: Tensor) -> Tensor:
        steps = torch.arange(T)
        bias = m.lin((steps[:, None] - steps[None]).abs()).permute(2, 0, 1)  # (D, T, T)
        return m.out(h + (h @ h.mT + bias[:1]).softmax(-1) @ h)

    model = seeded(lambda: Wired(run, lambda: nn.Embedding(T, D)))
    assert exact(model, 5)
    with pytest.raises(RowsError, match="a table is as long as the batch by chance"):
        exact(model, T)


# Layers and parameters that are used several times


@pytest.mark.parametrize(
    "run",
    [
        lambda m, h: m.out(m.lin(m.lin(h))),
        lambda m, h: m.out(m.lin(h) * m.lin(h.flip(1)).tanh()),
        lambda m, h: m.out(m.lin(h)) + m.out(h),
        lambda m, h: m.out(m.lin(m.lin(h)[:, :2]).sum(1, keepdim=True) + h),
        lambda m, h: m.out(m.lin(h) + 0 * m.lin(h).detach()),
        lambda m, h: m.out(0 * m.lin(h).detach() + m.lin(h)),
        lambda m, h: m.out(m.lin(h) + m.wte(torch.ones(h.shape[:2], dtype=torch.long))),
    ],
    ids=[
        "in a row",
        "side by side",
        "output layer",
        "other positions",
        "last not differentiated",
        "first not differentiated",
        "lookups",
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"granularity": "pairwise"}, {"strategy": "gram"}, {"guard": False}], ids=str
)
def test_a_layer_that_is_called_several_times(run: Callable, options: dict[str, Any]) -> None:
    assert exact(seeded(lambda: Wired(run)), **options)


# What must simply work


@pytest.mark.parametrize(
    "run",
    [
        lambda m, h: m.out(m.lin(h).relu_()),
        lambda m, h: m.out(h.relu_()),
        lambda m, h: m.out(m.lin(h).add_(h)),
        lambda m, h: m.out(input=m.lin(input=h)),
        lambda m, h: m.out(m.lin(h.transpose(0, 1).contiguous().transpose(0, 1))),
        lambda m, h: m.out(m.lin(h)[:, :, ::2].repeat_interleave(2, -1)),
        lambda m, h: m.out(m.lin(h).sum(1, keepdim=True).expand(h.shape)),
    ],
    ids=["in-place linear", "in-place embedding", "in-place sum", "keyword", "strided", "sliced", "expanded"],
)
def test_wirings(run: Callable) -> None:
    assert exact(seeded(lambda: Wired(run)))


def test_a_model_that_returns_a_tuple() -> None:
    model = seeded(lambda: Wired(lambda m, h: (m.out(m.lin(h)), h)))
    x, y = token_rows()
    truth = per_sample(deepcopy(model), lambda m, x: m(x)[0], x, y, 3)
    dots, _ = joint_step(model, x, y, 2, lambda m, x, y: per_sample_losses(lambda x: m(x)[0], x, y))
    assert truth.dot_error(dots) < 1e-10
    with pytest.raises((TypeError, ValueError), match="logits"):
        per_sample_losses(model, x, y)


@pytest.mark.parametrize("name", ["gpt2-tied", "fused-gpt2-tied"])
def test_one_target_in_a_row_and_rows_that_are_the_same(name: str) -> None:
    case = BY_NAME[name]
    x, y = (t[[0, 1, 0, 1]] for t in case.data(2))  # the train rows are the validation rows
    y[:, 1:] = -100
    model = case.model()
    truth = per_sample(case.model(), case.logits, x, y, 2)
    dots, _ = joint_step(model, x, y, 2, case.losses)
    assert truth.dot_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10


def test_an_input_that_needs_a_gradient() -> None:
    case = BY_NAME["linear-3d"]
    x, y = case.data(5)
    x.requires_grad_()
    model = case.model()
    truth = case.truth(3, 2)
    dots, losses = joint_step(model, x, y, 2)
    assert truth.dot_error(dots) < 1e-10
    plain = x.detach().clone().requires_grad_()
    losses = per_sample_losses(case.model(), plain, y)
    (losses[:3].mean() + losses[3:].mean()).backward()
    assert torch.allclose(gradient_of(x), gradient_of(plain), rtol=1e-12, atol=1e-14)


class LooksAtItself(nn.Module):
    """Its first guess, made without gradients, is an input of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor, guess: bool = False) -> Tensor:
        if not guess:
            with torch.no_grad():
                x = x + self(x, guess=True).mean(-1, keepdim=True)
        return self.out(self.lin(x).tanh())


def test_a_model_that_looks_at_itself() -> None:
    model, (x, y) = seeded(LooksAtItself), BY_NAME["linear-3d"].data(5)
    truth = per_sample(deepcopy(model), lambda m, x: m(x), x, y, 3)
    dots, _ = joint_step(model, x, y, 2)
    assert truth.dot_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10
