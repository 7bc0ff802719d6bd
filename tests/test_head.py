"""The output layer fused with its cross entropy, in parts so small that several are needed."""

from collections.abc import Callable

import pytest
import torch
from allocations import Allocations
from cases import BY_NAME, D, T, V, call_with_targets, gradient_of, joint_step
from torch import Tensor, nn

from ghostEngines import CrossEntropyHead, GradDotProdEngine
from ghostEngines.layer_rules import cross_entropy_head
from ghostEngines.strategies import STRATEGIES

FUSED = ["fused-head", "fused-gpt2-tied", "fused-gpt2-tied-padded", "fused-gpt2-untied"]


class Wrapped(nn.Module):
    """Nothing but a head."""

    def __init__(self, head: CrossEntropyHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.head(hidden, targets)


@pytest.fixture(params=[2 * T + 1, T - 1], ids=["two rows", "pieces"])
def small_parts(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiles_of: Callable[[int], None]
) -> None:
    """Two rows at a time, of which the last may be alone, or a row in two pieces; five positions of them in
    the softmax, and tiles of a few rows in the contraction."""
    monkeypatch.setattr(cross_entropy_head, "PART_POSITIONS", request.param)
    monkeypatch.setattr(cross_entropy_head, "SOFTMAX_POSITIONS", 5)
    tiles_of(5 * D)


def head_and_data(
    rows: int = 5, features: int = D, vocabulary: int = V, positions: int = T
) -> tuple[CrossEntropyHead, Tensor, Tensor]:
    """A head in float64, hidden states that need a gradient, targets of which each row has another number."""
    torch.manual_seed(0)
    head = CrossEntropyHead(features, vocabulary).double()
    nn.init.normal_(head.weight, std=features**-0.5)
    hidden = torch.randn(rows, positions, features, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (rows, positions))
    for i in range(rows):
        targets[i, : i % positions] = -100
    return head, hidden, targets


def plain_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same losses by plain autograd, in float32 or better from the logits on, as under autocast."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
    return losses.sum(1) / (targets != -100).sum(1)


def test_without_an_engine(small_parts) -> None:
    head, hidden, targets = head_and_data()
    wanted = plain_losses(hidden, head.weight, targets)
    want = torch.autograd.grad(3 * wanted.mean(), [hidden, head.weight])
    losses = head(hidden, targets)
    got = torch.autograd.grad(3 * losses.mean(), [hidden, head.weight])
    assert torch.allclose(losses, wanted, rtol=1e-13, atol=0)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < 1e-13


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FUSED)
def test_parts(name: str, strategy: str, pairwise: bool, small_parts) -> None:
    """Train rows in parts of 2, 2 and 1, validation rows in 2 and 1; or each row in two."""
    case = BY_NAME[name]
    truth, model = case.truth(5, 3), case.model()
    dots, losses = joint_step(
        model,
        *case.data(8),
        3,
        case.losses,
        strategy=strategy,
        granularity="pairwise" if pairwise else "total",
    )
    assert torch.allclose(losses, truth.losses, rtol=1e-12, atol=0)
    assert (truth.pairwise_error(dots) if pairwise else truth.dot_error(dots)) < 1e-12
    assert truth.gradient_error(model) < 1e-12


@pytest.mark.parametrize("name", FUSED)
def test_evaluation_gives_the_losses_of_training(name: str, small_parts) -> None:
    case = BY_NAME[name]
    model, (x, y) = case.model(), case.data(8)
    with torch.no_grad():
        evaluated = case.losses(model, x, y)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, case.losses(model, x, y).detach())


@pytest.mark.parametrize("strategy", [None, "project", "instantiate"])
def test_one_part_of_logits_at_a_time(strategy: str | None, small_parts) -> None:
    """Forward and backward: all that is as wide as the vocabulary stays below a part's logits and one chunk
    of the softmax together, and nothing else is larger, but for the gradient."""
    head, hidden, targets = head_and_data(rows=8, vocabulary=512)
    model = Wrapped(head)
    positions = 2 * T if cross_entropy_head.PART_POSITIONS > T else T // 2
    part, chunk = positions * 512 * 8, 5 * 512 * 8
    as_logits = Allocations(lambda tensor: tensor.dim() > 0 and tensor.shape[-1] == 512)
    anything = Allocations()
    with anything, as_logits:
        if strategy is None:
            head(hidden, targets).mean().backward()
        else:
            joint_step(model, hidden, targets, 3, call_with_targets, strategy=strategy)
    assert 0 < as_logits.peak <= part + chunk
    assert anything.largest <= max(part, 512 * D * 8)
    with Allocations() as plain:  # so that the measure is known to see logits
        plain_losses(hidden, head.weight, targets).mean().backward()
    assert plain.largest >= 4 * part


@pytest.mark.parametrize(
    "combine",
    [
        lambda losses: losses[:5].mean(),
        lambda losses: losses.sum(),
        lambda losses: losses.mean(),
        lambda losses: losses[0],
    ],
    ids=["train mean", "sum", "mean", "first"],
)
def test_other_row_weights_raise_under_an_engine(combine) -> None:
    case = BY_NAME["fused-gpt2-tied"]
    model, (x, y) = case.model(), case.data(8)
    with GradDotProdEngine(model, val_batch_size=3):
        loss = combine(case.losses(model, x, y))
        with pytest.raises(ValueError, match="joint_loss"):
            loss.backward()


@pytest.mark.parametrize(
    "combine", [lambda losses: losses[0], lambda losses: losses[:4].mean()], ids=["first", "four"]
)
def test_other_row_weights_raise_without_an_engine(combine) -> None:
    head, hidden, targets = head_and_data()
    loss = combine(head(hidden, targets))
    with pytest.raises(ValueError, match=r"losses\.mean\(\)"):
        loss.backward()


def test_a_loss_of_zero_weight_is_a_common_factor() -> None:
    head, hidden, targets = head_and_data()
    (0 * head(hidden, targets).mean()).backward()
    assert not gradient_of(head.weight).any()


@pytest.mark.parametrize("grad", [True, False])
def test_a_row_without_target_raises(grad: bool) -> None:
    head, hidden, targets = head_and_data()
    targets[3] = -100
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="no target"):
        head(hidden, targets)
    case = BY_NAME["fused-gpt2-tied"]
    model, (x, y) = case.model(), case.data(5)
    y[4] = -100
    with (
        GradDotProdEngine(model, 2),
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match="no target"),
    ):
        model(x, y)


@pytest.mark.parametrize("target", [-1, V])
@pytest.mark.parametrize("grad", [True, False])
def test_a_target_that_is_no_token_raises(target: int, grad: bool) -> None:
    """As in torch's own cross entropy: only -100 says that there is no target."""
    head, hidden, targets = head_and_data()
    targets[2, 3] = target
    with torch.set_grad_enabled(grad), pytest.raises((IndexError, RuntimeError, ValueError)):
        head(hidden, targets)


def test_shapes_that_do_not_fit_raise() -> None:
    head, hidden, targets = head_and_data()
    for bad in ((hidden[0], targets[0]), (hidden, targets[:, :-1]), (hidden, targets.flatten())):
        with pytest.raises(ValueError, match=r"\(N, T, d\)"):
            head(*bad)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_second_backward_raises(retain_graph: bool) -> None:
    """The gradients are scaled in place and handed out once; a second pass must not silently find none."""
    head, hidden, targets = head_and_data()
    loss = head(hidden, targets).mean()
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_second_derivative_raises() -> None:
    head, hidden, targets = head_and_data()
    (gradient,) = torch.autograd.grad(head(hidden, targets).mean(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
def test_only_one_side_needs_a_gradient(train_hidden: bool, train_weight: bool) -> None:
    head, hidden, targets = head_and_data()
    head.weight.requires_grad_(train_weight)
    hidden = hidden.detach().requires_grad_(train_hidden)
    (leaf,) = [t for t in (hidden, head.weight) if t.requires_grad]
    (want,) = torch.autograd.grad(plain_losses(hidden, head.weight, targets).mean(), leaf)
    (got,) = torch.autograd.grad(head(hidden, targets).mean(), leaf)
    assert (got - want).norm() / want.norm() < 1e-13


def half_gradients(
    dtype: torch.dtype, autocast: bool, fused: bool, factor: float = 1.0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Gradients of hidden and weight in half precision and in float64, and which tokens are nobody's
    target."""
    head, hidden, targets = head_and_data(rows=4, features=32, vocabulary=4096, positions=32)
    want = torch.autograd.grad(plain_losses(hidden, head.weight, targets).mean(), [hidden, head.weight])
    stored = torch.float32 if autocast else dtype
    head, hidden = head.to(stored), hidden.detach().to(stored).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        losses = head(hidden, targets) if fused else plain_losses(hidden, head.weight, targets)
    never = torch.ones(4096, dtype=torch.bool)
    never[targets[targets != -100]] = False
    return torch.autograd.grad(losses.mean() * factor, [hidden, head.weight]), want, never


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("positions", [10_000, 70, 20], ids=["one part", "two parts", "pieces of rows"])
def test_half_precision_is_as_exact_as_plain_autograd(
    positions: int, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts the gradient is the sum of."""
    monkeypatch.setattr(cross_entropy_head, "PART_POSITIONS", positions)
    ours, want, _ = half_gradients(dtype, autocast, fused=True)
    plain, _, _ = half_gradients(dtype, autocast, fused=False)
    for our, their, true in zip(ours, plain, want, strict=True):
        assert relative(our, true) < 1.2 * relative(their, true)


def test_float16_does_not_flush_the_softmax() -> None:
    """The gradient of a token that is nobody's target is all softmax. An entry, 1/4096, is within float16's
    range; times the 1/(N·T) of the loss and a factor on it, it is not, which plain autograd without a
    gradient scaler shows."""
    (_, ours), (_, want), never = half_gradients(torch.float16, True, fused=True, factor=1 / 64)
    (_, plain), _, _ = half_gradients(torch.float16, True, fused=False, factor=1 / 64)
    assert relative(ours[never] * 64, want[never]) < 2e-3
    assert relative(plain[never] * 64, want[never]) > 0.1
