"""What a step keeps for its backward pass and what it makes again, which never changes a number."""

from contextlib import nullcontext

import pytest
import torch
from allocations import Allocations
from cases import (
    BY_NAME,
    D,
    T,
    Wired,
    call_with_targets,
    copy_in,
    exact,
    fused_gpt2,
    gradient_of,
    joint_step,
    seeded,
)  # fmt: skip
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ghostEngines import GradDotProdEngine
from ghostEngines.passes import Pass
from model_setup import set_up_blocks
from models.causal_lm import CausalLM

N, M = 3, 2
BLOCKS = 2
WIDE = (N + M) * T * 4 * D * 8  # bytes of an MLP's widest tensors, in float64


def model_and_data(dtype: torch.dtype = torch.float64) -> tuple[CausalLM, Tensor, Tensor]:
    model = copy_in(seeded(lambda: fused_gpt2(True)), dtype)
    return model, *BY_NAME["fused-gpt2-tied"].data(N + M)


def step(
    model: CausalLM, x: Tensor, y: Tensor, attributed: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Losses, dot products and gradients of a step, under autocast if a dtype is given."""
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        if attributed:
            results = list(joint_step(model, x, y, M, call_with_targets))
        else:
            losses = model(x, y)
            losses.mean().backward()
            results = [losses.detach()]
    return results + [gradient_of(p) for p in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


PRECISIONS = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


@pytest.mark.parametrize("attributed", [False, True])
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_a_frugal_mlp_computes_the_same(
    dtype: torch.dtype, autocast: torch.dtype | None, attributed: bool
) -> None:
    results = []
    for frugal in (True, False):
        model, x, y = model_and_data(dtype)
        for block in model.hf.transformer.h:
            block.mlp.frugal = frugal
        results.append(step(model, x, y, attributed, autocast))
    assert same(*results)


def kept_after_forward(attributed: bool, frugal: bool = True, checkpointing: bool = False) -> int:
    """Bytes that were made in the forward pass and are still there."""
    model, x, y = model_and_data()
    set_up_blocks(model, compiled=False, checkpointing=checkpointing)
    for block in model.hf.transformer.h:
        block.mlp.frugal = frugal and block.mlp.frugal
    engine = GradDotProdEngine(model, M)
    if attributed:
        engine.attach()
    with Allocations() as made:
        losses = model(x, y)
    assert losses.requires_grad
    return made.live()


@pytest.mark.parametrize("attributed", [False, True])
def test_a_frugal_mlp_keeps_one_wide_tensor_of_two(attributed: bool) -> None:
    saved = kept_after_forward(attributed, frugal=False) - kept_after_forward(attributed)
    assert saved == BLOCKS * WIDE


@pytest.mark.parametrize("attributed", [False, True])
def test_checkpointing_keeps_the_inputs_of_the_blocks(attributed: bool) -> None:
    """No wide tensor is left: neither what an MLP makes again nor what it would make it from."""
    saved = kept_after_forward(attributed) - kept_after_forward(attributed, checkpointing=True)
    assert saved > BLOCKS * WIDE


def norm_then_linear(run) -> Wired:
    return seeded(lambda: Wired(run, lambda: nn.LayerNorm(D)))


def outputs_kept(run, autocast: torch.dtype | None = None) -> bool:
    """Whether the norm's output is still there after the forward pass."""
    model = norm_then_linear(run).float()
    outputs: list[StorageWeakRef] = []
    model.lin.register_forward_hook(
        lambda module, args, output: outputs.append(StorageWeakRef(output.untyped_storage()))
    )
    with GradDotProdEngine(model, M), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        logits = model(torch.zeros(N + M, T, dtype=torch.long))
    assert logits.requires_grad
    return not outputs[0].expired()


def test_a_norms_output_is_made_again_for_the_linear_layer_after_it() -> None:
    assert not outputs_kept(lambda m, h: m.out(m.lin(h)))
    assert not outputs_kept(lambda m, h: m.out(m.lin(h)), torch.bfloat16)
    assert outputs_kept(lambda m, h: m.out(m.lin(h).mul_(2)))  # so that the measure is known to see one


@pytest.mark.parametrize(
    "run",
    [
        lambda m, h: m.out(m.lin(h)),
        lambda m, h: m.out(m.lin(h).mul_(2)),
        lambda m, h: m.out(m.lin(h).mul_(2).add_(h)),
        lambda m, h: m.out(m.lin(h) + h),
        lambda m, h: m.out(m.lin(h)[:, :, :].view(h.shape)),
    ],
    ids=["as it is", "scaled in place", "changed twice", "added to", "a view"],
)
def test_a_linear_layer_after_a_norm_is_exact(run) -> None:
    assert exact(norm_then_linear(run))


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_making_a_norms_output_again_gives_the_same_numbers(
    dtype: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    frugal = step(*model_and_data(dtype), True, autocast)
    monkeypatch.setattr(Pass, "recomputable_input", lambda self, x: None)
    assert same(frugal, step(*model_and_data(dtype), True, autocast))


def test_scratch_memory_is_let_go_with_the_engine() -> None:
    model, x, y = model_and_data()
    engine = GradDotProdEngine(model, M, strategy="instantiate")
    engine.attach()
    engine.joint_loss(model(x, y)).backward()
    memory = [
        StorageWeakRef(buffer.untyped_storage()) for buffer in engine._pass().sink.scratch._buffers.values()
    ]
    assert memory and not any(reference.expired() for reference in memory)
    engine.detach()
    assert all(reference.expired() for reference in memory)
