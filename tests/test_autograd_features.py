"""The engine under what training loops add: checkpointing, DDP, accumulation, frozen parameters, clipping."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME, call_with_targets, fused_gpt2, gradient_of, joint_step
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.oracle import Truth, per_sample
from ghostEngines import GradDotProdEngine

MODELS = ["gpt2-tied", "gpt2-tied-padded", "fused-gpt2-tied-padded", "fused-gpt2-untied"]
N, M = 3, 2
CLIP = 0.5


def blocks(model: nn.Module) -> list[Any]:
    """The transformer blocks, which have an `mlp`."""
    return list(next(module for module in model.modules() if isinstance(module, nn.ModuleList)))


def checkpoint_blocks(model: nn.Module) -> None:
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def assert_exact(truth: Truth, dots: Tensor, model: nn.Module) -> None:
    assert truth.dot_error(dots) < 1e-10
    assert truth.gradient_error(model) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name: str) -> None:
    """The blocks run a second time within the backward pass, which is no second call."""
    case = BY_NAME[name]
    model = case.model().train()
    ran: list[int] = []
    blocks(model)[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    checkpoint_blocks(model)
    for _ in range(2):
        model.zero_grad()
        dots, _ = joint_step(model, *case.data(N + M), M, case.losses, guard=False)
        assert_exact(case.truth(N, M), dots, model)
    assert len(ran) == 4


def test_checkpointing_of_the_whole_model() -> None:
    """Embedding and head, whose weight is tied, in one checkpoint."""
    case = BY_NAME["gpt2-tied"]
    model = case.model()
    model.transformer.forward = partial(checkpoint, model.transformer.forward, use_reentrant=False)
    dots, _ = joint_step(model, *case.data(N + M), M, case.losses)
    assert_exact(case.truth(N, M), dots, model)


@pytest.mark.parametrize("guard", [True, False])
def test_reentrant_checkpointing_is_refused(guard: bool) -> None:
    """Its first pass runs without gradients, so that the layers in it do not see the step."""
    case = BY_NAME["gpt2-tied"]
    model = case.model()
    mlp = blocks(model)[0].mlp
    mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=True)
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
        joint_step(model, *case.data(N + M), M, case.losses, guard=guard)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("outside", [False, True], ids=["attached to the model", "attached to the wrapper"])
@pytest.mark.parametrize("name", MODELS)
def test_ddp(name: str, outside: bool) -> None:
    """To the last bit what it is without the wrapper, over two steps."""
    case = BY_NAME[name]
    alone, model = case.model(), case.model()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    engine = GradDotProdEngine(wrapped if outside else model, val_batch_size=M)
    engine.attach(torch.optim.SGD(wrapped.parameters()))
    for seed in (1, 2):
        x, y = case.data(N + M, seed)
        alone.zero_grad()
        wrapped.zero_grad()
        want, _ = joint_step(alone, x, y, M, case.losses)
        engine.joint_loss(case.losses(wrapped, x, y)).backward()
        engine.prepare_gradients()
        assert torch.equal(engine.dot_products(), want)
        assert all(
            torch.equal(gradient_of(p), gradient_of(q))
            for p, q in zip(model.parameters(), alone.parameters(), strict=True)
        )
    engine.detach()


@pytest.mark.parametrize("name", MODELS)
def test_steps_in_a_row(name: str) -> None:
    """Other rows, another number of them, an optimizer's step between."""
    case = BY_NAME[name]
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = case.model()
    engine = GradDotProdEngine(model, val_batch_size=M)
    engine.attach(optimizer)
    for seed, n in ((1, 3), (2, 5), (3, 1)):
        x, y = case.data(n + M, seed)
        twin.load_state_dict(model.state_dict())
        truth = per_sample(twin, case.logits, x, y, n)
        optimizer.zero_grad()
        engine.joint_loss(case.losses(model, x, y)).backward()
        engine.prepare_gradients()
        assert_exact(truth, engine.dot_products(), model)
        optimizer.step()
    engine.detach()


@pytest.mark.parametrize("name", MODELS)
def test_accumulation(name: str) -> None:
    """Two joint batches, each with half the loss: p.grad is the mean of their training gradients, and each
    has its dots."""
    case = BY_NAME[name]
    model, truths = case.model(), [case.truth(N, M, seed) for seed in (1, 2)]
    engine = GradDotProdEngine(model, val_batch_size=M)
    engine.attach()
    for seed, truth in zip((1, 2), truths, strict=True):
        (engine.joint_loss(case.losses(model, *case.data(N + M, seed))) / 2).backward()
        engine.prepare_gradients()
        assert truth.dot_error(engine.dot_products()) < 1e-10
    engine.detach()
    both = Truth(truths[0].gradients[:N] + truths[1].gradients[:N], truths[0].losses, 2 * N)
    assert both.gradient_error(model) < 1e-10


FROZEN = {
    "weights": lambda name: name.endswith("c_fc.weight"),
    "biases": lambda name: name.endswith(("c_fc.bias", "ln_1.bias")),
    "norm weights": lambda name: ".ln_" in name and name.endswith("weight"),
    "positions": lambda name: "wpe" in name,
    "tokens": lambda name: "wte" in name or "lm_head" in name,
    "head": lambda name: "lm_head" in name,
    "first block": lambda name: ".h.0." in name,
    "last block": lambda name: ".h.1." in name,
    "all but norms": lambda name: ".ln_" not in name,
    "all but the head": lambda name: "lm_head" not in name and "wte" not in name,
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters_are_left_out(name: str, frozen: str) -> None:
    """The dots are those over the parameters that train."""
    case = BY_NAME[name]

    def partly_frozen() -> nn.Module:
        model = case.model()
        for key, p in model.named_parameters():
            p.requires_grad_(not FROZEN[frozen](key))
        return model

    truth, model = case.truth(N, M, model=partly_frozen()), partly_frozen()
    dots, _ = joint_step(model, *case.data(N + M), M, case.losses)
    assert_exact(truth, dots, model)
    assert all(p.requires_grad or p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_twenty_steps_are_those_of_plain_training(tied: bool) -> None:
    """AdamW with clipping on the train rows alone, and with the engine on the joint batch: the same
    parameters."""
    case = BY_NAME["fused-gpt2-tied-padded"]
    trained = []
    for attributed in (True, False):
        torch.manual_seed(0)
        model = fused_gpt2(tied).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        engine = GradDotProdEngine(model, val_batch_size=M)
        if attributed:
            engine.attach(optimizer)
        norms = []
        for step in range(20):
            x, y = case.data(N + M, seed=step)
            optimizer.zero_grad()
            if attributed:
                engine.joint_loss(call_with_targets(model, x, y)).backward()
                engine.prepare_gradients()
            else:
                model(x[:N], y[:N]).mean().backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
        assert 0 < sum(norm > CLIP for norm in norms) < 20  # the clipping does clip
        trained.append(list(model.parameters()))
    for ours, plain in zip(*trained, strict=True):
        assert (ours - plain).norm() <= 1e-9 * plain.norm()
