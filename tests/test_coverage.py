"""Which layers the engine covers: exactly, or with an error that names what it cannot score."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import pytest
import torch
from cases import (
    D,
    V,
    Wired,
    exact,
    gradient_of,
    joint_step,
    mlp,
    seeded,
    token_rows,
    token_truth,
)  # fmt: skip
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ghostEngines import (
    RULES,
    GradDotProdEngine,
    RowsError,
    per_sample_losses,
    register_rule,
    register_unit,
)
from ghostEngines.descriptions import PerPosition
from ghostEngines.layer_rules.units import UNITS
from ghostEngines.row_maps import Indexed


def refused(model: nn.Module, match: str) -> str:
    """The message of a first step that is refused."""
    with pytest.raises(RuntimeError, match=match) as error:
        joint_step(seeded(lambda: model), *token_rows(), 2)
    return str(error.value)


def test_multihead_attention() -> None:
    """Its fused kernels mix rows with positions, and it reads the weight of `out_proj` without calling it."""
    model = Wired(
        lambda m, h: m.out(m.lin(h, h, h)[0]), lambda: nn.MultiheadAttention(D, 2, batch_first=True)
    )
    refused(model, r"lin\.in_proj_.*MultiheadAttention|layer 'lin\.out_proj' was used in another way")
    model.lin.requires_grad_(False)
    with GradDotProdEngine(model, 2):
        pass


class Shift(nn.Module):
    """Parameters directly on a module that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class SubclassedLinear(nn.Linear):
    """Does what its parent does, in words of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class TwiceLinear(nn.Linear):
    """Does something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias).tanh()


class ScaledEmbedding(nn.Embedding):
    """Gemma's: times a number."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 3.0


class OffsetEmbedding(nn.Embedding):
    """OPT's: positions from an offset on, made in the layer."""

    def forward(self, tokens: Tensor, start: int = 1) -> Tensor:
        return super().forward(torch.arange(tokens.shape[1])[None] + start)


class TokenAndScale(nn.Module):
    """A token before all rows, a scale 1 + w of every position, a sink of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(D))
        self.sink = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)[:, :-1] * (1 + self.scale)
        scores = torch.cat([x @ x.mT, self.sink.view(1, 1, 1).expand(*x.shape[:2], 1)], -1).softmax(-1)
        return scores[..., :-1] @ x


class Products(nn.Module):
    """Weights that multiply by themselves, one of them transposed; neither is square."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.randn(5, D))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.down) @ self.up


class Differences(nn.Module):
    """A parameter that is subtracted, and one that something is subtracted from."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.x_from = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.x_from - (x - self.from_x).tanh()


class Experts(nn.Module):
    """Stacked weights of experts, to which tokens are sent by what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, D, D))

    def forward(self, tokens: Tensor) -> Tensor:
        expert = (tokens[:, 0] > 0).long() + (tokens[:, 1] > 0).long()
        output = torch.zeros_like(tokens)
        for number in range(3):
            some = torch.where(expert == number)[0]
            output = output.index_add(0, some, (tokens[some] @ self.weight[number].T).tanh())
        return output


def conv(module: Callable[[], nn.Module]) -> tuple[Callable, Callable]:
    return lambda m, h: m.out(m.lin(h.mT)[..., : h.shape[1]].mT), module


WHATEVER = {
    "a shift": (lambda m, h: m.out(m.lin(h)), Shift),
    "a subclass": (lambda m, h: m.out(m.lin(h)), lambda: SubclassedLinear(D, D)),
    "another subclass": (lambda m, h: m.out(m.lin(h)), lambda: TwiceLinear(D, D)),
    "a scaled embedding": (lambda m, h: m.out(h + m.lin(h.argmax(-1))), lambda: ScaledEmbedding(V, D)),
    "positions from an offset on": (lambda m, h: m.out(h + m.lin(h)), lambda: OffsetEmbedding(9, D)),
    "tokens and scales": (lambda m, h: m.out(m.lin(h)), TokenAndScale),
    "products": (lambda m, h: m.out(m.lin(h)), Products),
    "differences": (lambda m, h: m.out(m.lin(h)), Differences),
    "experts": (lambda m, h: m.out(m.lin(h.flatten(0, 1)).view(h.shape)), Experts),
    "bilinear": (lambda m, h: m.out(m.lin(h, h)), lambda: nn.Bilinear(D, D, D)),
    "PReLU": (lambda m, h: m.out(m.lin(h)), nn.PReLU),
    "depthwise": conv(lambda: nn.Conv1d(D, D, 3, padding=2, groups=D)),
    "same": conv(lambda: nn.Conv1d(D, D, 4, padding="same", groups=2)),
    "strides": (
        lambda m, h: m.out(h + m.lin(h.mT).sum(-1)[:, None]), lambda: nn.Conv1d(D, D, 2, stride=2, dilation=2)
    ),
    "weight norm": (lambda m, h: m.out(m.lin(h)), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D))),
}  # fmt: skip


@pytest.mark.parametrize("name", WHATEVER)
def test_whatever_can_be_taken_apart_is_exact(name: str) -> None:
    run, between = WHATEVER[name]
    assert exact(seeded(lambda: Wired(run, between)))


class NearlyScaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        rows = super().forward(tokens)
        return rows * (3 + 1e-3 * (rows - 1))


class Moody(nn.Linear):
    """Does what its parent does on small inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if x.abs().max() < 50 else 2)


def test_a_subclass_that_is_nearly_its_parent() -> None:
    def run(m: Wired, h: Tensor) -> Tensor:
        return m.out(h + m.lin(h.argmax(-1)))

    assert exact(seeded(lambda: Wired(run, lambda: NearlyScaled(V, D))))
    assert exact(seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), lambda: Moody(D, D))))
    refused(Wired(lambda m, h: m.out(m.lin(100 * h)), lambda: Moody(D, D)), "by which its rule was found")


def test_as_many_rows_as_features() -> None:
    """A transposed weight then has the rows' number as its first dimension, and is no join for that."""
    assert exact(seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), lambda: TwiceLinear(D, D))), rows=D)


def test_a_product_and_a_sum_of_two_dtypes() -> None:
    """Under autocast a bias of one's own makes the output, and so the backprops, wider than the product."""
    model, (x, y) = Wired(lambda m, h: m.out(m.lin(h)), lambda: SubclassedLinear(D, D)), token_rows()
    plain = deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = per_sample_losses(plain, x[:3], y[:3])
    losses.mean().backward()
    with GradDotProdEngine(model, 2) as engine:
        with torch.autocast("cpu", torch.bfloat16):
            losses = per_sample_losses(model, x, y)
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        got, want = gradient_of(mine), gradient_of(theirs)
        assert (got - want).norm() < 0.02 * want.norm()


def test_several_patches_of_images_and_their_row_map() -> None:
    """Two images of a row, one after the other; in another order the rows must be named."""

    def model(order: Callable[[Tensor], Tensor]) -> Wired:
        def run(m: Wired, h: Tensor) -> Tensor:
            images = order(torch.stack([h, h.flip(1)], 1).flatten(0, 1))  # (2N, T, D)
            seen = m.lin(images.mT[..., None]).flatten(2).sum(-1)  # (2N, D)
            back = torch.empty_like(seen)
            back[order(torch.arange(len(seen)))] = seen
            return m.out(h + back.view(len(h), 2, 1, D).sum(1))

        return Wired(run, lambda: nn.Conv2d(D, D, (3, 1), stride=(3, 1)))

    assert exact(seeded(lambda: model(lambda images: images)))
    turned = seeded(lambda: model(lambda images: images.flip(0)))
    with pytest.raises(RowsError, match="at other rows of the output of layer 'lin'"):
        joint_step(turned, *token_rows(), 2)

    def rows(inputs: tuple, count: int) -> Indexed:
        return Indexed((torch.arange(2 * count) // 2).flip(0), count)

    turned.zero_grad()
    assert exact(turned, row_maps={"lin": rows})
    with pytest.raises(ValueError, match="row_maps: nowhere is no covered layer"):
        GradDotProdEngine(turned, 2, row_maps={"nowhere": rows}).attach()


def test_no_rule() -> None:
    """All that is not covered is named at once, with where it comes from and what to do."""
    model = Wired(lambda m, h: m.out(m.lin(h)[0]), lambda: nn.GRU(D, D, batch_first=True))
    message = refused(model, "the engine cannot tell")
    for said in ("'lin.bias_ih_l0' of torch.nn.modules.rnn.GRU", "requires_grad_(False)"):
        assert said in message
    assert "register_unit" in message and "register_rule" in message


class OfOnesOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum((0, 1))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return OfOnesOwn.apply(x, self.w)


def test_parameters_that_another_module_reads() -> None:
    """All that trains is in a container that is never called, as IA3's scales are."""

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(D))})

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scales["a"]

    model = Wired(lambda m, h: m.out(m.lin(h)), Holds)
    for module in (model.wte, model.out):
        module.requires_grad_(False)
    refused(model, r"the weight of layer 'lin\.scales' was used in another way")


def test_a_function_of_ones_own() -> None:
    """Whose backward cannot be called for one sample."""
    refused(
        Wired(lambda m, h: m.out(m.lin(h)), Fused),
        r"the engine cannot tell .*'lin\.w' of .*Fused \(it goes into OfOnes",
    )


def test_a_parameter_of_a_layer_and_of_a_module_of_its_own() -> None:
    for rows in range(3, 7):
        model, twice = (
            seeded(lambda: Wired(lambda m, h: m.out(m.twice(m.lin(h))))),
            TwiceLinear(D, D).double(),
        )
        model.add_module("twice", twice)
        twice.weight = model.lin.weight
        assert exact(model, rows)


@pytest.mark.parametrize("granularity", ["total", "pairwise", "per_layer"])
def test_a_unit_on_the_users_word(granularity: str) -> None:
    class Recurrent(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one output, as layers have
            return super().forward(x)[0]

    register_unit(Recurrent)
    try:
        layer = partial(Recurrent, D, D, batch_first=True)
        model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(m.lin(h))), layer))
        assert exact(model, granularity=granularity)
    finally:
        del UNITS[Recurrent]


def test_a_unit_whose_rows_depend_on_each_other() -> None:
    class Capacity(nn.Module):
        """Only so many rows get an expert."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, D, D))

        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.arange(len(x))[:, None, None] < 2
            return torch.where(chosen, x @ self.weight[0], x @ self.weight[1])

    refused(Wired(lambda m, h: m.out(m.lin(h)), Capacity), "gives a row another output alone")


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


def lookups_after_the_output_layer(m: Wired, h: Tensor) -> Tensor:
    first = m.out(h)
    return first * m.lin(first.argmax(-1)).tanh().sum(-1, keepdim=True)


def three(m: Wired) -> None:
    m.lin.weight = m.out.weight = m.wte.weight


def two_linear(m: Wired) -> None:
    m.lin.weight = m.out.weight


def biases(m: Wired) -> None:
    m.lin.bias = m.out.bias


def with_the_embedding(m: Wired) -> None:
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
        (two_linear, lambda: nn.Embedding(V, D), lookups_after_the_output_layer),
        (with_the_embedding, lambda: Conv1D(D, V), lambda m, h: m.out(h + m.lin(m.out(h).tanh()))),
    ],
    ids=[
        "embedding and two output layers",
        "two layers",
        "biases",
        "two embeddings",
        "lookups last",
        "a transposed layer",
    ],
)
@pytest.mark.parametrize("options", [{}, {"strategy": "gram"}, {"granularity": "pairwise"}], ids=str)
def test_parameters_that_layers_share(
    share: Callable[[Wired], None], between: Callable[[], nn.Module], run: Callable, options: dict[str, Any]
) -> None:
    model = seeded(lambda: Wired(run, between))
    share(model)
    assert exact(model, **options)


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
    def scale(layer: Scale, inputs: tuple[Tensor, ...], backprops: Tensor) -> dict[str, PerPosition]:
        return {"w": PerPosition(backprops * inputs[0])}

    yield
    del RULES[Scale]


@pytest.mark.usefixtures("scale_rule")
@pytest.mark.parametrize(
    "options", [{}, {"granularity": "pairwise"}, {"granularity": "per_layer"}, {"strategy": "gram"}], ids=str
)
def test_a_rule_of_ones_own(options: dict[str, Any]) -> None:
    assert exact(seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), Scale)), **options)
    with pytest.raises(ValueError, match="Scale has a rule already"):
        register_rule(Scale)(lambda layer, inputs, backprops: {})


@pytest.mark.usefixtures("scale_rule")
@pytest.mark.parametrize("direction", ["gradient", "auto"])
def test_a_rule_of_ones_own_in_micro_batches(direction: Literal["gradient", "auto"]) -> None:
    """Nothing that the rule could forget decides on it: it is exact by construction."""
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), Scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, eps=1e-3)
    truth = token_truth(model, m=1)
    engine = GradDotProdEngine(model, 1, micro_batches=2, direction=direction)
    engine.attach(optimizer)
    x, y = token_rows()
    rows = [[0, 1, 4], [2, 3]]
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
    first = (1 - 0.9) / (1 - 0.9**2)  # of the second update
    weights = torch.ones(()) if direction == "gradient" else first / (gradients[:4].mean(0).abs() + 1e-3)
    want = gradients[:4] @ (weights * gradients[4])
    assert torch.allclose(torch.cat(dots), want, rtol=1e-9, atol=1e-12)
