"""How many operations the matrix products of a step take, with and without the engine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from ghostEngines import GradDotProdEngine
from ghostEngines.contraction import Split
from ghostEngines.descriptions import Matrix
from ghostEngines.memory import Scratch
from ghostEngines.sinks import DotProducts, Site
from ghostEngines.strategies import STRATEGIES
from models.architectures import architecture_config
from models.causal_lm import CausalLM

pytestmark = pytest.mark.usefixtures("values_unread")  # tensors without values have none
aten = torch.ops.aten


def product(a: torch.Size, b: torch.Size) -> int:
    """Operations of (..., r, q) @ (..., q, s), or of a matrix or vector with a vector."""
    return 2 * a.numel() * (b[-1] if len(b) > 1 else 1)


# PyTorch's counter knows neither in-place products nor those with a vector.
PRODUCTS: dict[Any, Callable[..., int]] = {
    aten.addmm_: lambda total, a, b, *rest, **options: product(a, b),
    aten.baddbmm_: lambda total, a, b, *rest, **options: product(a, b),
    aten.addmv_: lambda total, a, b, *rest, **options: product(a, b),
    aten.addmv: lambda total, a, b, *rest, **options: product(a, b),
    aten.mv: lambda a, b, *rest, **options: product(a, b),
    aten.dot: lambda a, b, *rest, **options: product(a, b),
}


def operations(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        run()
    return counter.get_total_flops()


def one_block() -> CausalLM:
    """GPT2-Small's widths and vocabulary, with one block of the twelve, which is the harder case: the head
    counts for more."""
    config = architecture_config("GPT2-Small")
    config.n_layer = 1
    model = CausalLM(GPT2LMHeadModel(config))
    model.hf.transformer.h[0].mlp.frugal = False  # which would ask tensors without values for their address
    return model


def step_operations(n: int, m: int, positions: int, attributed: bool, **options: Any) -> int:
    with FakeTensorMode() as shapes:  # without values: nothing is computed
        model = one_block()
        x = torch.zeros(n + m, positions, dtype=torch.long)

    def regular() -> None:
        model(x, x).mean().backward()

    def graddotprod() -> None:
        with GradDotProdEngine(model, m, guard=False, **options) as engine:
            engine.joint_loss(model(x, x)).backward()

    with shapes:
        return operations(graddotprod if attributed else regular)


@pytest.mark.parametrize(("positions", "n", "m"), [(256, 8, 1), (1024, 2, 1), (1024, 2, 4), (512, 4, 2)])
def test_attribution_adds_next_to_no_operations(positions: int, n: int, m: int) -> None:
    ratio = step_operations(n, m, positions, True) / step_operations(n, m, positions, False)
    assert 0.9 < ratio <= 1.02


@pytest.mark.parametrize(("positions", "n", "m"), [(256, 8, 1), (1024, 2, 1)])
def test_positions_take_less_than_one_more_product(positions: int, n: int, m: int) -> None:
    """Of the train rows with each weight, beside three of all rows: to, and twice from, its output."""
    by_position = step_operations(n, m, positions, True, granularity="token")
    ratio = by_position / step_operations(n, m, positions, True)
    assert 1.05 < ratio < 1 + n / (3 * (n + m))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_counter_sees_every_strategy(strategy: str) -> None:
    n, m, positions, p, d = 5, 3, 7, 11, 13
    left, right = torch.zeros(n + m, positions, p), torch.zeros(n + m, positions, d)
    gradient = 2 * positions * p * d
    want = {
        "gram": n * gradient + 2 * n * m * positions**2 * (p + d),
        "project": (n + m) * gradient + n * gradient + n * 2 * positions * d,
        "instantiate": (n + m) * gradient + n * 2 * p * d,
    }[strategy]
    sink = DotProducts(Split(n, m), Scratch(), strategy)
    assert operations(lambda: sink.take(Site(torch.Size((p, d))), Matrix(left, right))) == want
