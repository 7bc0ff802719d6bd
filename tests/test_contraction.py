"""Every strategy directly against the per-sample gradients written out in float64."""

from collections.abc import Callable

import pytest
import torch
from allocations import Allocations
from torch import Tensor

from ghostEngines import contraction
from ghostEngines.contraction import Split, Validation, Whole, direction_of, tiles
from ghostEngines.descriptions import Matrix, PerSample
from ghostEngines.memory import Scratch
from ghostEngines.sinks import DotProducts, Site
from ghostEngines.strategies import STRATEGIES, Strategy, choose_strategy, register_strategy

P, D = 7, 5
GPT2_SMALL = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768)]


def factors(n: int, m: int, positions: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 10 * m + 100 * positions)
    left = torch.randn(n + m, positions, P, generator=generator, dtype=torch.float64)
    right = torch.randn(n + m, positions, D, generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype)


def gradients_of(left: Tensor, right: Tensor) -> Tensor:
    """The gradient of each sample (N, p, d), in float64."""
    return torch.einsum("ntp,ntd->npd", left.double(), right.double())


def truth(left: Tensor, right: Tensor, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_i G_i (p, d), dots (n, k) and the direction (k, p, d), from one gradient per sample."""
    gradients = gradients_of(left, right)
    train, val = gradients[: split.n], gradients[split.n :]
    direction = val if split.pairwise else val.sum(0, keepdim=True)
    return train.sum(0), torch.einsum("npd,kpd->nk", train, direction), direction


def sink(split: Split, strategy: str | None = None, scratch: Scratch | None = None) -> DotProducts:
    return DotProducts(split, scratch or Scratch(), strategy)


def contract(
    left: Tensor, right: Tensor, split: Split, strategy: str, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """A layer, in scratch memory that a larger one has used and left its numbers in."""
    if scratch is None:
        scratch = Scratch()
        for dtype in (torch.float32, torch.float64):
            for use in ("gradients", "direction"):
                scratch.take(use, 10_000, torch.empty(0, dtype=dtype)).fill_(torch.nan)
    site = Site(torch.Size((left.shape[2], right.shape[2])))
    return sink(split, strategy, scratch).take(site, Matrix(left, right))


@pytest.fixture(params=[True, False], ids=["tall", "wide"])
def tall(request: pytest.FixtureRequest) -> bool:
    """Whether the weight has more rows than columns: it is cut along its longer side."""
    return request.param


@pytest.fixture
def small_tiles(tiles_of: Callable[[int], None]) -> None:
    """Tiles of 3, 3 and 1 rows or columns."""
    tiles_of(3 * D)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fresh", [False, True], ids=["added to what was there", "fresh"])
@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("positions", [1, 7])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n", [1, 5])
def test_strategies(
    n: int, m: int, positions: int, pairwise: bool, strategy: str, fresh: bool, tall: bool, small_tiles
) -> None:
    split = Split(n, m, pairwise)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        left, right = factors(n, m, positions, dtype)
        left, right = (left, right) if tall else (right, left)
        want_total, want_dots, want_direction = truth(left, right, split)
        start = torch.linspace(-1, 1, P * D, dtype=dtype).view(want_total.shape)
        total = torch.full_like(start, torch.nan) if fresh else start.clone()
        train, val = (left[:n], right[:n]), (left[n:], right[n:])
        direction = direction_of(*val, split)
        assert error(direction, want_direction) < bound
        against = (
            Whole(direction)
            if STRATEGIES[strategy].by_direction
            else Validation(*val, split, None, Scratch())
        )
        dots = STRATEGIES[strategy].contract(*train, against, total, fresh, Scratch())
        assert dots.dtype == total.dtype == dtype
        assert error(dots, want_dots) < bound
        was_there = 0 if fresh else start.double()
        assert error(total, was_there + want_total) < bound


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tile", [1, 2 * D, 3 * D + 1, 1 << 17])
def test_a_whole_layer_whatever_the_tile(
    strategy: str, tile: int, tall: bool, tiles_of: Callable[[int], None]
) -> None:
    tiles_of(tile)
    split = Split(4, 2)
    left, right = factors(4, 2, 6)
    left, right = (left, right) if tall else (right, left)
    want_total, want_dots, _ = truth(left, right, split)
    total, dots = contract(left, right, split, strategy)
    assert error(total, want_total) < 1e-13
    assert error(dots, want_dots) < 1e-13


def test_instantiate_makes_two_tiles_and_the_gradient(tall: bool, small_tiles) -> None:
    """Neither the gradient of one sample nor the direction, (p, d) each, is ever there as a whole; and in
    scratch memory that is there already nothing is made but the gradient of the step."""
    left, right = factors(2, 1, 9)
    left, right = (left, right) if tall else (right, left)
    scratch = Scratch()
    with Allocations() as made:
        contract(left, right, Split(2, 1), "instantiate", scratch)
    with Allocations(lambda tensor: tensor.numel() > 2) as again:
        contract(left, right, Split(2, 1), "instantiate", scratch)
    assert made.largest == P * D * 8
    assert made.peak < (P * D + 2 * 3 * D) * 8 + 100
    assert again.peak == P * D * 8


@pytest.mark.parametrize(("p", "d"), [(7, 5), (5, 7), (300, 2), (2, 300), (768, 3072), (50304, 768), (1, 1)])
@pytest.mark.parametrize("numel", [1, 700, 1 << 20])
def test_tiles_cover_a_weight_once(p: int, d: int, numel: int) -> None:
    covered = torch.zeros(p, d, dtype=torch.int)
    sizes = []
    for tile in tiles(p, d, numel):
        covered[tile] += 1
        sizes.append(covered[tile].numel())
    assert (covered == 1).all()
    assert max(sizes) <= max(numel, contraction.SIDE * min(p, d))
    assert max(sizes) - min(sizes) <= min(p, d) * len(sizes)  # no small rest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_views_that_are_not_contiguous(strategy: str) -> None:
    split = Split(4, 2)
    left, right = factors(4, 2, 6)
    left, right = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (left, right))
    right = right.flip(2).contiguous().flip(2)
    assert not left.is_contiguous()
    want_total, want_dots, _ = truth(left, right, split)
    total, dots = contract(left, right, split, strategy)
    assert error(total, want_total) < 1e-13
    assert error(dots, want_dots) < 1e-13


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, strategy: str, pairwise: bool) -> None:
    split = Split(5, 3, pairwise)
    left, right = factors(5, 3, 7, dtype)
    want_total, want_dots, _ = truth(left, right, split)
    total, dots = contract(left, right, split, strategy)
    assert total.dtype == dots.dtype == torch.float32
    bound = 4 * torch.finfo(dtype).eps
    assert error(total, want_total) < bound
    assert error(dots, want_dots) < bound


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("backprop", "activation"), [(1e-4, 1.0), (1e-2, 300.0)])
def test_float16_dots_neither_flush_nor_overflow(backprop: float, activation: float, strategy: str) -> None:
    """The weight gradients are well within float16's range, so the dots must be good: a product of two
    backprops (1e-8) or of two activations (1e5) that is formed on the way must not leave that range."""
    split = Split(4, 2)
    left, right = factors(4, 2, 7)
    left, right = (left * backprop).half(), (right * activation).half()
    want_total, want_dots, _ = truth(left, right, split)
    total, dots = contract(left, right, split, strategy)
    assert error(total, want_total) < 1e-2
    assert error(dots, want_dots) < 1e-2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_outlier_does_not_cost_the_others_their_digits(strategy: str) -> None:
    """Every row's dot is as exact as its own gradient allows, whatever those of the rows around it."""
    split = Split(6, 2)
    left, right = factors(6, 2, 7, torch.float32)
    left[:6] *= torch.tensor([1.0, 1e3, 1.0, 1e-3, 1e3, 1e-3])[:, None, None]
    _, want, direction = truth(left, right, split)
    _, dots = contract(left, right, split, strategy)
    norms = gradients_of(left, right)[:6].flatten(1).norm(dim=1) * direction.norm()
    assert ((dots.double() - want).squeeze(1).abs() / norms).max() < 1e-5


def test_the_direction_is_a_sum_of_products() -> None:
    """Not the product of the sums over validation rows."""
    left, right = factors(0, 3, 6)
    wrong = left.sum(0).mT @ right.sum(0)
    direction = direction_of(left, right, Split(1, 3))
    assert error(direction, truth(left, right, Split(0, 3))[2]) < 1e-13
    assert error(wrong[None], direction) > 0.1


@pytest.mark.parametrize("pairwise", [False, True])
def test_gradients_that_are_there(pairwise: bool) -> None:
    left, right = factors(4, 3, 6)
    split = Split(4, 3, pairwise)
    want_total, want_dots, _ = truth(left, right, split)
    gradients = gradients_of(left, right)
    total, dots = sink(split).take(Site(gradients.shape[1:]), PerSample(gradients))
    assert error(total, want_total) < 1e-13
    assert error(dots, want_dots) < 1e-13


def test_a_strategy_of_ones_own() -> None:
    """One class and one registration: it can be forced, and is chosen where it costs least."""

    @register_strategy
    class Written(Strategy):
        name = "written"

        def extra_cost(self, problem) -> float:
            return -1.0

        def contract(self, left, right, against, total, fresh, scratch) -> Tensor:
            gradients = left.mT @ right
            total.copy_(gradients.sum(0))
            return torch.einsum("npd,kpd->nk", gradients, against.whole())

    try:
        assert choose_strategy(Split(4, 2), 6, P, D) == "written"
        left, right = factors(4, 2, 6)
        want_total, want_dots, _ = truth(left, right, Split(4, 2))
        total, dots = contract(left, right, Split(4, 2), "written")
        assert error(total, want_total) < 1e-13 and error(dots, want_dots) < 1e-13
        with pytest.raises(ValueError, match="there is a strategy 'written' already"):
            register_strategy(Written)
    finally:
        del STRATEGIES["written"]


@pytest.mark.parametrize(("p", "d"), GPT2_SMALL)
def test_the_choice_at_gpt2_small(p: int, d: int) -> None:
    """gram for short rows, instantiate for long ones, one change-over between, the same answer every time."""
    for m in (1, 4):
        split = Split(8, m)
        choices = [choose_strategy(split, positions, p, d) for positions in range(1, 1025)]
        assert choices == [choose_strategy(split, positions, p, d) for positions in range(1, 1025)]
        assert choices[15] == "gram"
        assert choices[1023] == "instantiate"
        assert choices == sorted(choices)  # "gram" < "instantiate"


def test_more_validation_rows_make_gram_dearer() -> None:
    def positions_with_gram(m: int) -> int:
        return sum(
            choose_strategy(Split(8, m), positions, 768, 768) == "gram" for positions in range(1, 1025)
        )

    assert positions_with_gram(16) < positions_with_gram(1)
