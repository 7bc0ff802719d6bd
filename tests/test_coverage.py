"""What the engine cannot score is an error that says why: nothing is left out of a dot product in silence."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from cases import D, V, Wired, joint_step, mlp, seeded, token_rows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.oracle import per_sample
from ghostEngines import RULES, GradDotProdEngine, per_sample_losses, register_rule
from ghostEngines.descriptions import PerPosition


def attach(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    GradDotProdEngine(model, val_batch_size=2).attach(optimizer)


def test_multihead_attention_bypasses_its_output_layer() -> None:
    model = Wired(
        lambda m, h: m.out(m.lin(h, h, h)[0]), lambda: nn.MultiheadAttention(D, 2, batch_first=True)
    )
    with pytest.raises(ValueError, match="'lin' of type MultiheadAttention"):
        attach(model)
    model.lin.in_proj_weight.requires_grad_(False)
    model.lin.in_proj_bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'lin\.out_proj' of type NonDynamicallyQuantizableLinear"):
        attach(model)
    model.lin.requires_grad_(False)
    attach(model)


class Shift(nn.Module):
    """Parameters directly on a module that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class SubclassedLinear(nn.Linear):
    """May use its weight in any way."""


@pytest.mark.parametrize(
    "between", [Shift, lambda: SubclassedLinear(D, D), lambda: nn.GRU(D, D), lambda: nn.Bilinear(D, D, D)]
)
def test_no_rule(between) -> None:
    kind = type(between()).__name__
    with pytest.raises(ValueError, match="no rule covers") as error:
        attach(Wired(lambda m, h: m.out(m.lin(h)), between))
    for said in ("'lin'", kind, f"register_rule({kind})", "requires_grad_(False)"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [True, False])
def test_reparametrised_layers(norm, bias: bool) -> None:
    with pytest.raises(ValueError, match="'lin"):
        attach(Wired(lambda m, h: m.out(m.lin(h)), lambda: norm(nn.Linear(D, D, bias=bias))))


def test_foreign_parameters_on_a_covered_layer() -> None:
    model = Wired(lambda m, h: m.out(m.lin(h)))
    model.lin.lora_A = nn.Parameter(torch.zeros(2, D))
    with pytest.raises(ValueError, match=r"'lin' of type Linear .* lora_A"):
        attach(model)


@pytest.mark.parametrize(
    "options",
    [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}],
    ids=lambda options: next(iter(options)),
)
def test_embedding_options(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attach(nn.Sequential(nn.Embedding(V, D, **options), nn.Linear(D, V)))


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.AlphaDropout, nn.Dropout1d])
def test_dropout(dropout) -> None:
    with pytest.raises(ValueError, match=r"'1' drops out with p=0\.1"):
        attach(nn.Sequential(nn.Linear(D, D), dropout(0.1), nn.Linear(D, V)))
    attach(nn.Sequential(nn.Linear(D, D), dropout(0.0), nn.Linear(D, V)))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(affine: bool) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=affine), nn.Linear(D, V))
    with pytest.raises(ValueError, match="'1' of type BatchNorm1d normalises over the batch"):
        attach(model)


def test_batch_norm_that_is_switched_on_while_attached() -> None:
    """In eval mode it is a fixed map of each row; from train() on it mixes them, and nothing else would say
    so."""
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False), nn.Linear(D, V)).eval()
    x, y = torch.randn(5, D), torch.arange(5)
    joint_step(model, x, y, 2)
    engine = GradDotProdEngine(model, 2)
    engine.attach()
    model.train()
    with pytest.raises((ValueError, RuntimeError), match="BatchNorm1d"):
        engine.joint_loss(per_sample_losses(model, x, y))


def three(m: nn.Module) -> None:
    m.lin.weight = m.out.weight = m.wte.weight


def two_linear(m: nn.Module) -> None:
    m.lin.weight = m.out.weight


def biases(m: nn.Module) -> None:
    m.lin.bias = m.out.bias


def with_the_embedding(m: nn.Module) -> None:
    m.lin.weight = m.wte.weight


@pytest.mark.parametrize(
    ("share", "between", "run"),
    [
        (three, lambda: nn.Linear(D, V), lambda m, h: m.out(h) + m.lin(h.tanh())),
        (two_linear, lambda: nn.Linear(D, V), lambda m, h: m.out(h) + m.lin(h.tanh())),
        (biases, lambda: nn.Linear(D, V), lambda m, h: m.out(h) + m.lin(h.tanh())),
        (
            with_the_embedding,
            lambda: nn.Embedding(V, D),
            lambda m, h: m.out(h + m.lin(torch.ones(h.shape[:2], dtype=torch.long))),
        ),
        (with_the_embedding, lambda: Conv1D(D, V), lambda m, h: m.out(h + m.lin(m.out(h).tanh()))),
    ],
    ids=["embedding and two output layers", "two layers", "biases", "two embeddings", "a transposed layer"],
)
@pytest.mark.parametrize("options", [{}, {"strategy": "gram"}, {"granularity": "pairwise"}], ids=str)
def test_parameters_that_layers_share(share, between, run, options: dict) -> None:
    def model() -> nn.Module:
        built = seeded(lambda: Wired(run, between))
        share(built)
        return built

    truth = per_sample(model(), lambda m, x: m(x), *token_rows(), 3)
    attributed = model()
    dots, _ = joint_step(attributed, *token_rows(), 2, **options)
    assert (truth.pairwise_error(dots) if "granularity" in options else truth.dot_error(dots)) < 1e-10
    assert truth.gradient_error(attributed) < 1e-10


def test_what_cannot_be_shared() -> None:
    """A norm's weight with a row of lookups."""
    model = Wired(lambda m, h: m.out(m.lin(h)), lambda: nn.LayerNorm((V, D)))
    model.lin.weight = model.wte.weight
    with pytest.raises(ValueError, match=r"wte\.weight and lin\.weight are one parameter"):
        attach(model)


def test_the_optimizer_must_train_what_is_scored() -> None:
    model = mlp(True)
    some = [p for name, p in model.named_parameters() if name != "2.bias"]
    foreign = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"does not update 2\.bias"):
        attach(model, torch.optim.SGD(some, lr=0.1))
    with pytest.raises(ValueError, match="1 trainable parameters that are not in the model"):
        attach(model, torch.optim.SGD([*model.parameters(), foreign], lr=0.1))
    foreign.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    attach(model, torch.optim.SGD([*some, foreign], lr=0.1))


def test_nothing_trains() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        attach(mlp(True).requires_grad_(False))


@pytest.mark.parametrize("m", [0, -1])
def test_validation_rows_are_needed(m: int) -> None:
    with pytest.raises(ValueError, match=f"val_batch_size must be at least 1, got {m}"):
        GradDotProdEngine(mlp(True), val_batch_size=m)


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="gram, instantiate, project"):
        GradDotProdEngine(mlp(True), val_batch_size=1, strategy="fused")


# A rule of one's own


class Scale(nn.Module):
    """y = x ∘ w: a layer type that is new to the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


@pytest.fixture
def scale_rule() -> Iterator[None]:
    @register_rule(Scale, parameters=("w",))
    def scale(layer: Scale, inputs, backprops: Tensor) -> dict[str, PerPosition]:
        return {"w": PerPosition(backprops * inputs[0])}

    yield
    del RULES[Scale]


@pytest.mark.usefixtures("scale_rule")
@pytest.mark.parametrize(
    "options", [{}, {"granularity": "pairwise"}, {"granularity": "per_layer"}, {"strategy": "gram"}], ids=str
)
def test_a_rule_of_ones_own(options: dict) -> None:
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), Scale))
    truth = per_sample(model, lambda m, x: m(x), *token_rows(), 3)
    dots, _ = joint_step(model, *token_rows(), 2, **options)
    if options.get("granularity") == "pairwise":
        assert truth.pairwise_error(dots) < 1e-12
    else:
        assert truth.dot_error(dots.view(3, -1).sum(1)) < 1e-12
    assert truth.gradient_error(model) < 1e-12
    with pytest.raises(ValueError, match="Scale has a rule already"):
        register_rule(Scale)(lambda layer, inputs, backprops: {})


@pytest.mark.usefixtures("scale_rule")
@pytest.mark.parametrize("direction", ["gradient", "adamw"])
def test_a_rule_of_ones_own_in_micro_batches(direction: str) -> None:
    """Nothing that the rule could forget decides on it: it is exact by construction."""
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), Scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, eps=1e-3)
    engine = GradDotProdEngine(model, 1, micro_batches=2, direction=direction)
    engine.attach(optimizer)
    x, y = token_rows()
    rows = [[0, 1, 4], [2, 3]]
    truth = per_sample(deepcopy(seeded(lambda: Wired(model.run, Scale))), lambda m, x: m(x), x, y, 4)
    for _ in range(2):
        dots = []
        for some in rows:
            engine.joint_loss(per_sample_losses(model, x[some], y[some])).backward()
            engine.prepare_gradients()
            dots.append(engine.dot_products())
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    gradients = truth.vectors()
    weights = torch.ones(()) if direction == "gradient" else 1 / (gradients[:4].mean(0).abs() + 1e-3)
    want = gradients[:4] @ (weights * gradients[4])
    assert torch.allclose(torch.cat(dots), want, rtol=1e-9, atol=1e-12)


def test_the_rule_is_gone() -> None:
    with pytest.raises(ValueError, match="no rule covers module 'lin' of type Scale"):
        attach(Wired(lambda m, h: m.out(m.lin(h)), Scale))
