"""Dot products against forward-mode differentiation, which needs no backward pass per sample and no rule.

<∇ℓ_i, v> is the derivative of ℓ_i in the direction v. With v = ∇L_val, from one plain backward pass, one
pass of forward-mode differentiation over an untouched model gives the dot products of all rows at once.
"""

import pytest
import torch
from cases import BY_NAME, Case, joint_step
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import PreTrainedModel

from benchmarks.oracle import row_loss
from models.gpt2 import FrugalMLP

NAMES = [
    "linear-3d", "conv1d", "layer-norm", "embedding", "positions-broadcast", "tied-linear", "fused-head",
    "gpt2-tied", "gpt2-untied", "gpt2-tied-padded", "fused-gpt2-tied-padded", "fused-gpt2-untied",
]  # fmt: skip
N, M = 5, 3


class Losses(nn.Module):
    """The case's model, its losses written out from its logits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.model = case, case.model()
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                module.set_attn_implementation("eager")  # fused attention has no forward-mode derivative
            if isinstance(module, FrugalMLP):
                module.frugal = False  # nor do tensors under torch.func have an address

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.case.logits(self.model, x)
        rows = zip(
            logits.flatten(1, -2) if logits.dim() > 2 else logits[:, None], y.view(len(y), -1), strict=True
        )
        return torch.stack([row_loss(row_logits, targets) for row_logits, targets in rows])


@pytest.mark.parametrize("name", NAMES)
def test_directional_derivatives(name: str) -> None:
    case = BY_NAME[name]
    x, y = case.data(N + M)
    untouched = Losses(case)
    parameters = {key: p.detach() for key, p in untouched.named_parameters()}
    loss = untouched(x[N:], y[N:]).mean()
    gradient = torch.autograd.grad(loss, list(untouched.parameters()))
    direction = dict(zip(parameters, gradient, strict=True))
    losses, derivatives, *_ = jvp(
        lambda p: functional_call(untouched, p, (x[:N], y[:N])), (parameters,), (direction,)
    )
    model = case.model()
    dots, got = joint_step(model, x, y, M, case.losses)
    assert torch.allclose(got[:N], losses, rtol=1e-12, atol=0)
    scale = norm_of(gradient) * per_row_norms(untouched, x, y)
    assert ((dots - derivatives).abs() / scale).max() < 1e-10


def norm_of(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()


def per_row_norms(untouched: Losses, x: Tensor, y: Tensor) -> Tensor:
    """(N,): the norms of the train rows' gradients, the scale by which an error of a dot product is
    measured."""
    norms = []
    for i in range(N):
        loss = untouched(x[i : i + 1], y[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, list(untouched.parameters()))
        norms.append(norm_of(gradients))
    return torch.stack(norms)
