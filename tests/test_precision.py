"""Half precision: dots and sums stay in float32, and no number is cast that was not asked to be."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from allocations import Allocations
from cases import BY_NAME, call_with_targets, copy_in, fused_logits, gradient_of, joint_step
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.oracle import Truth, per_sample
from ghostEngines import GradDotProdEngine, per_sample_losses
from ghostEngines.strategies import STRATEGIES
from models.causal_lm import CausalLM

VOCABULARY, POSITIONS, N, M = 61, 24, 64, 4
HALF = [torch.bfloat16, torch.float16]
FUSED = ["fused-gpt2-tied-padded", "fused-gpt2-untied"]
MODELS = ["gpt2-tied", "tied-linear", *FUSED]


def small_model() -> CausalLM:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return CausalLM(GPT2LMHeadModel(config))


def small_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(VOCABULARY, (2, N + M, POSITIONS), generator=generator)
    return x, y


@cache
def float32_dots() -> Tensor:
    return joint_step(small_model(), *small_data(), M, call_with_targets)[0]


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def scaled_step(
    engine: GradDotProdEngine, model: nn.Module, dtype: torch.dtype, scale: float, x: Tensor, y: Tensor
) -> Tensor:
    """Dots of a step under autocast with a factor on the loss, as a gradient scaler puts it."""
    with torch.autocast("cpu", dtype):
        losses = model(x, y)
    (engine.joint_loss(losses) * scale).backward()
    engine.prepare_gradients()
    return engine.dot_products()


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_ranks_as_float32_does(dtype: torch.dtype, strategy: str | None) -> None:
    model = small_model()
    with GradDotProdEngine(model, M, strategy=strategy) as engine:
        dots = scaled_step(engine, model, dtype, 1024.0, *small_data())
    assert dots.dtype == torch.float32
    assert spearman(dots, float32_dots()) >= 0.99
    assert all(gradient_of(p).dtype == torch.float32 for p in model.parameters())


def test_the_ranking_is_no_matter_of_course() -> None:
    """Rows in another order would not pass."""
    shuffled = float32_dots()[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    assert abs(spearman(shuffled, float32_dots())) < 0.5


@pytest.mark.parametrize("name", MODELS)
def test_float32_makes_no_other_dtype(name: str) -> None:
    case = BY_NAME[name]
    model = copy_in(case.model(), torch.float32)
    with Allocations(lambda tensor: tensor.is_floating_point()) as made:
        joint_step(model, *case.data(8), 3, case.losses)
    assert made.dtypes == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forward_too", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_backward_inside_autocast(name: str, forward_too: bool, dtype: torch.dtype) -> None:
    """The forward pass decides on the dtype: a `backward()` inside the context casts nothing more, or, where
    the layers' own backwards would, is refused."""
    case = BY_NAME[name]
    results = []
    for inside in (False, True):
        model = copy_in(case.model(), dtype)
        with GradDotProdEngine(model, 3) as engine:
            with torch.autocast("cpu", torch.bfloat16, enabled=forward_too):
                loss = engine.joint_loss(case.losses(model, *case.data(8)))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                if inside and not forward_too and dtype == torch.float32:
                    with pytest.raises(
                        RuntimeError, match="outside of it: the layers' own backwards would be cast"
                    ):
                        loss.backward()
                    return
                loss.backward()
                engine.prepare_gradients()
                results.append((engine.dot_products(), *(p.grad for p in model.parameters())))
    for outside, inside in zip(*results, strict=True):
        assert inside.dtype == outside.dtype == dtype
        assert torch.equal(inside, outside)


def training_gradient_error(model: nn.Module, truth: Truth) -> dict[str, float]:
    got = {name: gradient_of(p).double() for name, p in model.named_parameters()}
    return {
        name: ((got[name] - want).norm() / want.norm()).item()
        for name, want in truth.training_gradient().items()
    }


def small_truth(dtype: torch.dtype, x: Tensor, y: Tensor, n: int) -> Truth:
    """In float64, at the very weights that the model in `dtype` has."""
    model = small_model().to(dtype).double()
    return per_sample(model, lambda _, x: fused_logits(model, x), x, y, n)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=["bfloat16 model", "autocast"])
def test_the_training_gradient_is_as_exact_as_plain_autograd(parameters: torch.dtype, strategy: str) -> None:
    x, y = (t[: 16 + M] for t in small_data())
    truth = small_truth(parameters, x, y, 16)
    plain, model = small_model().to(parameters), small_model().to(parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        logits = lambda x: plain.hf.transformer(x).last_hidden_state @ plain.hf.lm_head.weight.T  # noqa: E731
        per_sample_losses(logits, x[:16], y[:16]).mean().backward()
        dots, _ = joint_step(model, x, y, M, call_with_targets, strategy=strategy)
    ours, theirs = training_gradient_error(model, truth), training_gradient_error(plain, truth)
    assert dots.dtype == torch.float32
    assert sum(ours.values()) <= 1.2 * sum(theirs.values())
    assert (
        max(ours[name] / theirs[name] for name in ours) <= 2.5
    )  # single small parameters are a matter of luck
    assert truth.dot_error(dots) < 4e-3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float64, 1e-5)])
def test_losses_of_another_dtype_than_the_model(dtype: torch.dtype, bound: float) -> None:
    """A loss function of one's own may well stay in half precision, or go up."""
    case = BY_NAME["gpt2-tied"]
    x, y = case.data(8)
    truth = per_sample(case.model(), case.logits, x, y, 5)
    model = copy_in(case.model(), torch.float32)
    dots, losses = joint_step(model, x, y, 3, lambda m, x, y: per_sample_losses(m, x, y).to(dtype))
    assert losses.dtype == dtype
    assert dots.dtype == torch.float32
    assert truth.dot_error(dots) < bound
    assert truth.gradient_error(model) < bound


def test_a_gradient_scaler() -> None:
    """Its scale cancels in the dots; a step that it skips has dots that are not finite, and no exception."""
    x, y = (t[: 8 + M] for t in small_data())
    want, _ = joint_step(small_model(), x, y, M, call_with_targets)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for scale in (2.0**8, 2.0**14):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        with GradDotProdEngine(model, M) as engine:
            engine_dots = scaled_by(scaler, engine, model, x, y)
        assert ((engine_dots - want).norm() / want.norm()) < 0.02
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale


def scaled_by(
    scaler: torch.amp.GradScaler, engine: GradDotProdEngine, model: nn.Module, x: Tensor, y: Tensor
) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        losses = model(x, y)
    scaler.scale(engine.joint_loss(losses)).backward()
    engine.prepare_gradients()
    return engine.dot_products()


def test_a_step_that_the_scaler_skips() -> None:
    x, y = (t[: 8 + M] for t in small_data())
    model = small_model()
    before = deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with GradDotProdEngine(model, M) as engine:
        dots = scaled_by(scaler, engine, model, x, y)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not dots.isfinite().any()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        optimizer.zero_grad()
        scaler.update(2.0**8)
        assert scaled_by(scaler, engine, model, x, y).isfinite().all()  # and the next step is a good one
