"""What groups.py and corrupted.py of benchmarks/fidelity measure with, on models of a few thousand parameters."""

import numpy as np
import pytest
import torch

from benchmarks.fidelity.corrupted import KINDS, corrupt
from benchmarks.fidelity.figures_groups import Seed, lds
from benchmarks.fidelity.states import N, Rows, Setting, T, clip
from benchmarks.fidelity.values import Training, order, take

SETTING = Setting("AdamW", 1e-3, 0.25, seed=0, layers=1, width=32, vocabulary=50)


def some_rows(count: int, seed: int) -> Rows:
    x, y = torch.randint(50, (2, count, T), generator=torch.Generator().manual_seed(seed))
    return x, y


def test_each_epoch_has_every_row_once() -> None:
    steps = order(4 * N, epochs=2, seed=0)
    assert steps.shape == (8, N)
    for epoch in (steps[:4], steps[4:]):
        assert sorted(epoch.ravel()) == list(range(4 * N))


def test_a_row_left_out_has_weight_zero_in_its_step() -> None:
    rows, kept = some_rows(N, 1), torch.arange(N) % 3 > 0
    training, other = Training.new(SETTING), Training.new(SETTING)
    training.step(take(rows, np.flatnonzero(kept)))
    for group in other.optimizer.param_groups:
        group["lr"] /= 20  # the first step of the rise
    for number, weight in enumerate(kept.float() / N):
        (other.model(*take(rows, [number])).sum() * weight).backward()
    clip(other.model, SETTING.clip)
    other.optimizer.step()
    for a, b in zip(training.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_scored_step_is_the_step_and_its_exact_values_are_near_the_others_ranking() -> None:
    rows, validation = some_rows(N, 1), some_rows(3, 2)
    training = Training.new(SETTING)
    for seed in range(3, 8):
        training.step(some_rows(N, seed))
    other = training.copy()
    values = training.scored_step(rows, validation)
    other.step(rows)
    for a, b in zip(training.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert np.corrcoef(values["exact"], values["in_pass"])[0, 1] > 0.5
    assert values["loss"] == pytest.approx(np.full(N, np.log(50)), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_rows_are_corrupted(kind: str) -> None:
    rows = some_rows(10, 1)
    x, y = corrupt(rows, np.array([2, 7]), kind, seed=0)
    changed = (y != rows[1]).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 7]
    assert torch.equal(x[~changed], rows[0][~changed])
    if kind == "shuffled":
        for row in (2, 7):
            before = torch.cat([rows[0][row, :1], rows[1][row]])
            assert torch.equal(torch.cat([x[row, :1], y[row]]).sort().values, before.sort().values)
    else:
        assert torch.equal(x, rows[0])


def test_lds_of_an_additive_world() -> None:
    """Where the falls are sums of the rows' effects, these have an LDS of 1, and other numbers do not."""
    draw = np.random.default_rng(0)
    effects, others = draw.normal(size=(2, 60))
    seeds = []
    for _ in range(3):
        left_in = np.stack([draw.permutation(60) < 30 for _ in range(40)])
        scores = {"2": {"exact": effects, "random": others}}
        seeds.append(Seed(left_in, scores, {"2": left_in @ effects}, {}))
    assert lds(seeds, "2", "exact") == pytest.approx((1, 1, 1))
    point, low, high = lds(seeds, "2", "random")
    assert low < point < high < 0.5
