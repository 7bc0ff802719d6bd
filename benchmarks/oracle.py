"""What the engine must compute, the slow and obviously correct way: one backward pass per sample. Shares
nothing with ghostEngines.

The cross entropy is taken of the float64 logits themselves: Hugging Face's loss function would cast them to
float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Logits = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Truth:
    """gradients: per row, per parameter name; losses (n+m,); n train rows come first."""

    gradients: list[dict[str, Tensor]]
    losses: Tensor
    n: int

    def vectors(self) -> Tensor:
        """(n+m, all parameters)"""
        return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in self.gradients])

    def part(self, layers: list[str]) -> "Truth":
        """The same for the parameters of some layers."""
        rows = [
            {name: g for name, g in row.items() if name.rpartition(".")[0] in layers}
            for row in self.gradients
        ]
        return Truth(rows, self.losses, self.n)

    def times(self, weights: Tensor) -> "Truth":
        """The same with every gradient times weights (all parameters,)."""
        rows = []
        for row in self.gradients:
            parts = weights.split([g.numel() for g in row.values()])
            rows.append(
                {name: g * part.view_as(g) for (name, g), part in zip(row.items(), parts, strict=True)}
            )
        return Truth(rows, self.losses, self.n)

    def pairwise(self) -> Tensor:
        """(n, m)"""
        rows = self.vectors()
        return rows[: self.n] @ rows[self.n :].T

    def dots(self) -> Tensor:
        """(n,)"""
        return self.pairwise().mean(1)

    def dot_error(self, got: Tensor) -> float:
        """max over i of |got_i - want_i| / (‖∇ℓ_i‖·‖∇L_val‖)"""
        rows = self.vectors()
        norms = rows[: self.n].norm(dim=1) * rows[self.n :].mean(0).norm()
        assert got.shape == (self.n,)
        return ((got.double() - self.dots()).abs() / norms).max().item()

    def pairwise_error(self, got: Tensor) -> float:
        """max over i, j of |got_ij - want_ij| / (‖∇ℓ_i‖·‖∇ℓ_j‖)"""
        norms = self.vectors().norm(dim=1)
        want = self.pairwise()
        assert got.shape == want.shape
        return ((got.double() - want).abs() / (norms[: self.n, None] * norms[None, self.n :])).max().item()

    def training_gradient(self) -> dict[str, Tensor]:
        """Of the mean loss of the train rows."""
        return {
            name: sum(row[name] for row in self.gradients[: self.n]) / self.n for name in self.gradients[0]
        }

    def gradient_error(self, model: nn.Module) -> float:
        """max over parameters of ‖Δ‖/‖want‖; a parameter that should have no gradient must have none, or
        zero."""
        worst = 0.0
        for name, want in self.training_gradient().items():
            got = dict(model.named_parameters())[name].grad
            got = torch.zeros_like(want) if got is None else got.double()
            scale = want.norm().item()
            worst = max(worst, (got - want).norm().item() / scale if scale > 0 else got.norm().item())
        return worst


def row_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood over the targets that are there, written out."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    picked = [log_p[t, y[t]] for t in range(len(y)) if y[t] != -100]
    return -torch.stack(picked).mean()


def per_loss(model: nn.Module, loss: Callable[[int], Tensor], samples: int, n: int) -> Truth:
    """model: in float64. loss(i): the loss of sample i, a scalar."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows, losses = [], []
    for i in range(samples):
        own = loss(i)
        gradients = torch.autograd.grad(own, list(named.values()), allow_unused=True)
        rows.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(named.items(), gradients, strict=True)
            }
        )
        losses.append(own.detach())
    return Truth(rows, torch.stack(losses), n)


def per_sample(model: nn.Module, logits: Logits, x: Tensor, y: Tensor, n: int) -> Truth:
    """model: in float64. logits(model, x) -> (1, T, V) or (1, V) for one row x (1, ...)."""

    def loss(i: int) -> Tensor:
        own = logits(model, x[i : i + 1])
        return row_loss(own.reshape(-1, own.shape[-1]), y[i].reshape(-1))

    return per_loss(model, loss, len(x), n)
