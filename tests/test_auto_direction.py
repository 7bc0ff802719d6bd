"""Direction "auto": dot products with the validation gradient times what the optimizer multiplies a gradient with.

The oracle keeps its own second moments, from its own per-sample gradients (Kingma & Ba, arXiv 1412.6980)."""

from collections import defaultdict

import pytest
import torch
from cases import BY_NAME, CASES, Case, copy_in
from torch import Tensor, nn

from benchmarks.oracle import Truth, per_sample
from ghostEngines import GradDotProdEngine

BETAS, STEPS = (0.9, 0.95), 3
NAMES = [case.name for case in CASES]
TIED = ["tied-linear", "gpt2-tied", "fused-gpt2-tied-padded"]


class Oracle:
    """The second moments of a run, before each of its steps."""

    def __init__(self, eps: float) -> None:
        self.eps, self.steps, self.v = eps, 0, torch.zeros(())

    def preconditioner(self) -> Tensor:
        """(all parameters,)"""
        first = (1 - BETAS[0]) / (1 - BETAS[0] ** (self.steps + 1))
        scale = first / ((self.v / (1 - BETAS[1] ** self.steps)).sqrt() + self.eps)
        return scale * (self.v > 0)  # where there has been no gradient, nothing is known of the step

    def update(self, truth: Truth) -> None:
        gradient = truth.vectors()[: truth.n].mean(0)
        self.v, self.steps = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2, self.steps + 1


def run(
    case: Case,
    n: int,
    m: int,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-3,
    micro: int = 1,
    **options,
) -> tuple[Tensor, Truth, Oracle, list[str], nn.Module]:
    """STEPS steps of n·micro train rows. The last one's dot products, its truth, and the oracle before it."""
    model, oracle = copy_in(case.model(), dtype), Oracle(eps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS, eps=eps, fused=True)
    engine = GradDotProdEngine(model, m, direction="auto", micro_batches=micro, **options)
    engine.attach(optimizer, loss_scale=8.0)
    rows = n * micro
    for step in range(STEPS):
        x, y = case.data(rows + m, seed=1 + step)
        truth = per_sample(copy_of(model, case), case.logits, x, y, rows)
        x = x.to(dtype) if x.is_floating_point() else x
        dots = []
        for start in range(0, rows, n):
            some = [*range(start, start + n), *(range(rows, rows + m) if start == 0 else ())]
            (8.0 * engine.joint_loss(case.losses(model, x[some], y[some]))).backward()
            engine.prepare_gradients()
            dots.append(engine.dot_products())
        assert engine.scored == (step > 0) == (not torch.cat(dots).isnan().any())
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 8.0
        if step < STEPS - 1:
            optimizer.step()
            oracle.update(truth)
        optimizer.zero_grad()
    names = engine.layer_names
    engine.detach()
    return torch.cat(dots), truth, oracle, names, model


def copy_of(model: nn.Module, case: Case) -> nn.Module:
    """Its weights in float64, without an engine."""
    copy = case.model()
    copy.load_state_dict(model.state_dict())
    return copy


def error(got: Tensor, truth: Truth, oracle: Oracle) -> float:
    """max |got - want| / (‖P^½ ∇ℓ_i‖·‖P^½ ∇ℓ_j‖), with the mean validation gradient where got is (n,)."""
    rows, p = truth.vectors(), oracle.preconditioner()
    left, right = (
        rows[: truth.n],
        rows[truth.n :] if got.dim() == 2 else rows[truth.n :].mean(0, keepdim=True),
    )
    norms = (p.sqrt() * left).norm(dim=1)[:, None] * (p.sqrt() * right).norm(dim=1)
    want = (left * p) @ right.T
    assert got.shape in (want.shape, want.shape[:1])
    return ((got.double().view_as(want) - want).abs() / norms).max().item()


@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str) -> None:
    dots, truth, oracle, *_ = run(BY_NAME[name], 3, 2)
    assert error(dots, truth, oracle) < 1e-10
    assert truth.dot_error(dots) > 1e-3  # and not the plain dot products


@pytest.mark.parametrize("name", TIED)
def test_float32(name: str) -> None:
    dots, truth, oracle, *_ = run(BY_NAME[name], 3, 2, torch.float32)
    assert dots.dtype == torch.float32
    assert error(dots, truth, oracle) < 2e-4  # of parameters that have gone their own way for two steps


@pytest.mark.parametrize("name", TIED)
def test_torchs_own_epsilon(name: str) -> None:
    """Entries that no train row has touched yet weigh 1/ε."""
    dots, truth, oracle, *_ = run(BY_NAME[name], 3, 2, eps=1e-8)
    assert error(dots, truth, oracle) < 1e-10


@pytest.mark.parametrize("strategy", ["project", "instantiate"])
@pytest.mark.parametrize("name", ["linear-3d", "conv1d", *TIED, "fused-gpt2-untied"])
def test_every_strategy(name: str, strategy: str) -> None:
    dots, truth, oracle, *_ = run(BY_NAME[name], 3, 2, strategy=strategy)
    assert error(dots, truth, oracle) < 1e-10


@pytest.mark.parametrize("name", ["embedding", "layer-norm", "conv1d", *TIED, "fused-gpt2-untied"])
def test_pairwise(name: str) -> None:
    dots, truth, oracle, *_ = run(BY_NAME[name], 3, 2, granularity="pairwise")
    assert dots.shape == (3, 2)
    assert error(dots, truth, oracle) < 1e-10


@pytest.mark.parametrize("name", ["embedding-padding", *TIED, "fused-gpt2-untied"])
def test_micro_batches(name: str) -> None:
    dots, truth, oracle, *_ = run(BY_NAME[name], 2, 2, micro=3)
    assert dots.shape == (6,)
    assert error(dots, truth, oracle) < 1e-10


@pytest.mark.parametrize("name", ["gpt2-tied", "fused-gpt2-untied"])
def test_per_layer(name: str) -> None:
    dots, truth, oracle, names, model = run(BY_NAME[name], 3, 2, granularity="per_layer")
    assert error(dots.sum(1), truth, oracle) < 1e-10
    p, start, scales = oracle.preconditioner(), 0, {}
    for parameter, value in truth.gradients[0].items():
        scales[parameter] = p[start : start + value.numel()].view_as(value).sqrt()
        start += value.numel()
    scaled = [{name: g * scales[name] for name, g in row.items()} for row in truth.gradients]
    sharing = defaultdict(list)
    for layer in names:
        sharing[model.get_submodule(layer).weight].append(layer)
    for layers in sharing.values():
        got = dots[:, [names.index(layer) for layer in layers]].sum(1)
        assert Truth(scaled, truth.losses, truth.n).part(layers).dot_error(got) < 1e-10


def test_what_cannot_be_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="gram"):
        GradDotProdEngine(model, 1, direction="auto", strategy="gram").attach(
            torch.optim.AdamW(model.parameters())
        )
    with pytest.raises(ValueError, match="direction must be one of"):
        GradDotProdEngine(model, 1, direction="adam")  # type: ignore[arg-type]  # wrong on purpose
    engine = GradDotProdEngine(model, 1, direction="auto")
    with pytest.raises(ValueError, match="attach the engine with the optimizer"):
        engine.attach()


def test_a_parameter_whose_first_gradient_comes_late_is_an_error() -> None:
    """Its second moment is not there when the others' are."""
    case = BY_NAME["linear-3d"]
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = case.data(3)
    engine = GradDotProdEngine(model, 1, direction="auto")
    engine.attach(optimizer)
    engine.joint_loss(case.losses(model, x, y)).backward()
    for parameter in model[2].parameters():
        parameter.grad = None
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"'2' has no second moment"):
        case.losses(model, x, y)
