"""Samples that are not the model's rows: documents packed into a row, pairs of rows."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from cases import (
    D,
    V,
    Wired,
    call_with_targets,
    fused_gpt2,
    gradient_of,
    joint_step,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_rows,
)
from torch import Tensor, nn

from benchmarks.oracle import Truth, per_loss, row_loss
from ghostEngines import (
    AttachError,
    GradDotProdEngine,
    RowsError,
    packed_documents,
    per_sample_losses,
    register_unit,
    verify,
)
from ghostEngines.layer_rules.units import UNITS

LENGTHS = [
    [3, 2, 5],
    [4, 6],
    [1, 1, 8],
]  # of the documents of each row; the last one's are validation documents
M = 3


def packed(lengths: list[list[int]] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and position ids (R, T); no document predicts the next one's first token."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(V, (len(lengths), sum(lengths[0])), generator=generator)
    y, positions = torch.randint(V, x.shape, generator=generator), torch.zeros_like(x)
    for row, each in enumerate(lengths):
        positions[row] = torch.cat([torch.arange(length) for length in each])
    y[0, 1] = -100
    return x, y, positions


def own_attention(positions: Tensor) -> Tensor:
    """(R, 1, T, T), whether a position sees another one: an earlier one of the same document."""
    documents = packed_documents(positions)
    same = documents[:, :, None] == documents[:, None, :]
    return (same & torch.ones_like(same[0]).tril())[:, None]


def alone(model: nn.Module, call: Callable, samples: Tensor, x: Tensor, y: Tensor, n: int) -> Truth:
    """Each document in a row of its own."""

    def loss(i: int) -> Tensor:
        own = samples == i
        ids = x[own][None]
        return row_loss(call(model, ids, torch.arange(ids.shape[1])[None], None)[0], y[own])

    return per_loss(model, loss, int(samples.max()) + 1, n)


def hugging_face(model: nn.Module, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("strategy", [None, "gram", "instantiate", "project"])
@pytest.mark.parametrize("build", [lambda: tiny_gpt2(True), tiny_llama])
def test_documents_packed_into_rows(build: Callable[[], nn.Module], strategy: str | None) -> None:
    model, (x, y, positions) = seeded(build), packed()
    samples = packed_documents(positions)
    n = int(samples.max()) + 1 - M
    truth = alone(deepcopy(model), hugging_face, samples, x, y, n)

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return per_sample_losses(
            lambda x: hugging_face(model, x, positions, own_attention(positions)), x, y, samples=samples
        )

    dots, got = joint_step(model, x, y, M, losses, samples=packed_documents, strategy=strategy)
    assert torch.allclose(got, truth.losses, rtol=1e-6)  # the model rounds to float32 inside
    assert truth.dot_error(dots) < 1e-6 and truth.gradient_error(model) < 1e-6
    model.zero_grad()
    pairs, _ = joint_step(model, x, y, M, losses, samples=packed_documents, granularity="pairwise")
    assert truth.pairwise_error(pairs) < 1e-6


def test_documents_that_see_each_other_are_refused() -> None:
    model, (x, y, positions) = seeded(tiny_llama), packed()

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        every = torch.ones(10, 10, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
        return per_sample_losses(
            lambda x: hugging_face(model, x, positions, every), x, y, samples=packed_documents(positions)
        )

    with pytest.raises(RowsError, match="has a gradient at other rows"):
        joint_step(model, x, y, M, losses, samples=packed_documents)


class Wirings(nn.Module):
    """Everything between embedding and output that meets the samples in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.table = nn.Parameter(torch.ones(D)), nn.Embedding(10, D)
        self.unit, self.each = Unit(), nn.Linear(D, D)
        self.whole = nn.Parameter(torch.zeros(10, D))

    def forward(self, h: Tensor) -> Tensor:
        rows, positions = h.shape[:2]
        h = h * self.scale + self.table(torch.arange(positions))
        h = h + self.unit(h) + self.whole[:positions].sin()
        return h + self.each(h.flatten(0, 1)).tanh().view(rows, positions, -1)


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(D))

    def forward(self, h: Tensor) -> Tensor:
        return (h @ self.w.exp()).tanh()


@pytest.fixture
def unit():
    register_unit(Unit)
    yield
    del UNITS[Unit]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_every_way_to_meet_the_samples(unit: None, rows: int, micro_batches: int) -> None:
    """Rows that are few or one; positions of no row's own, bare parameters, units, flattened tokens."""
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)), Wirings))
    x, y, positions = packed(LENGTHS[:rows])
    samples = packed_documents(positions)
    count = int(samples.max()) + 1
    m = 1 if rows == 1 else M
    index = [samples]
    if micro_batches == 2:  # of as many documents in other places
        index.append((samples % (count - m)).clone())
    plain, own = deepcopy(model), samples

    def loss(i: int) -> Tensor:
        return row_loss(plain(x)[own == i], y[own == i])

    engine = GradDotProdEngine(model, m, samples=lambda x: own, micro_batches=micro_batches)
    truths, dots = [], []
    engine.attach()
    for own in index:
        truths.append(per_loss(plain, loss, int(own.max()) + 1, count - m))
        engine.joint_loss(per_sample_losses(model, x, y, samples=own)).backward()
        engine.prepare_gradients()
        dots.append(engine.dot_products())
    engine.detach()
    direction = truths[0].vectors()[count - m :].mean(0)
    for truth, got in zip(truths, dots, strict=True):
        want = truth.vectors()[: count - m] @ direction
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12 * want.abs().max().item())
    for name, p in model.named_parameters():
        want = torch.stack([truth.training_gradient()[name] for truth in truths]).mean(0)
        assert torch.allclose(gradient_of(p), want, rtol=1e-9, atol=1e-12), name


def test_pairs_of_rows() -> None:
    """A loss of two rows, as in learning from preferences: chosen rows, then rejected ones."""
    model, (x, y) = (
        seeded(lambda: Wired(lambda m, h: m.out(m.lin(h.flatten(0, 1)).view_as(h)))),
        token_rows(8),
    )
    pair = torch.arange(8) % 4

    def preference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        log_p = -per_sample_losses(model, x, y)
        return -nn.functional.logsigmoid(log_p[: len(x) // 2] - log_p[len(x) // 2 :])

    plain = deepcopy(model)

    def loss(i: int) -> Tensor:
        (own,) = preference(plain, x[pair == i], y[pair == i])
        return own

    truth = per_loss(plain, loss, 4, 3)
    dots, _ = joint_step(model, x, y, 1, preference, samples=lambda x: pair)
    assert truth.dot_error(dots) < 1e-12 and truth.gradient_error(model) < 1e-12
    with pytest.raises(RowsError):  # the pairs are others
        joint_step(model, x, y, 1, preference, samples=lambda x: torch.arange(8) // 2)
    report = verify(model, (x, y), lambda model, batch: preference(model, *batch), samples=lambda x: pair)
    assert report.exact and report.rows == 4


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(4, 2, 2, dtype=torch.long), "samples must return integers"),
        (torch.zeros(4), "samples must return integers"),
        (torch.arange(3), r"samples returned \(3,\)"),
        (torch.tensor([0, 1, 2, -1]), "numbered from 0"),
        (torch.tensor([0, 1, 3, 3]), "sample 2 of 4 has no entry"),
        (torch.tensor([0, 0, 0, 0]), "called with 1 samples, the last 1 of which are validation samples"),
    ],
)
def test_an_index_that_is_none(index: Tensor, message: str) -> None:
    model, (x, y) = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h)))), token_rows(4)
    with pytest.raises(ValueError, match=message):
        joint_step(model, x, y, 1, samples=lambda x: index)


def test_what_needs_rows_as_samples() -> None:
    model = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h))))
    model.lin.compile()
    with pytest.raises(AttachError, match="uncompiled code only"):
        GradDotProdEngine(model, 1, samples=lambda x: torch.arange(4)).attach()
    x, y, positions = packed()
    turned = seeded(lambda: Wired(lambda m, h: m.out(m.lin(h.mT).mT), lambda: nn.Conv1d(D, D, 1)))
    with pytest.raises(ValueError, match=r"'lin' got an input of shape \(3, 8, 10\), .* row_maps"):
        joint_step(turned, x, y, M, samples=lambda x: packed_documents(positions))
    fused = seeded(lambda: fused_gpt2(True))
    with pytest.raises(ValueError, match="one row for each of the 8 samples"):
        joint_step(fused, x, y, M, call_with_targets, samples=lambda x, y: packed_documents(positions))
