"""Compute what the engine must compute, slow and obviously correct: one backward pass per sample.

It shares no code with ghostEngines. The cross entropy is computed from the float64 logits: Hugging Face's
loss function would cast them to float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Logits = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Truth:
    """The gradients of all rows. The train rows come first."""

    gradients: list[dict[str, Tensor]]  # of each row, by parameter name
    losses: Tensor  # (n+m,)
    n: int  # train rows

    def vectors(self) -> Tensor:
        """Return the gradients as a matrix, (n+m, all parameters)."""
        return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in self.gradients])

    def part(self, layers: list[str]) -> "Truth":
        """Return the truth for the parameters of some layers."""
        rows = [
            {name: g for name, g in row.items() if name.rpartition(".")[0] in layers}
            for row in self.gradients
        ]
        return Truth(rows, self.losses, self.n)

    def times(self, weights: Tensor) -> "Truth":
        """Return the truth with every gradient times weights (all parameters,)."""
        rows = []
        for row in self.gradients:
            parts = weights.split([g.numel() for g in row.values()])
            rows.append(
                {name: g * part.view_as(g) for (name, g), part in zip(row.items(), parts, strict=True)}
            )
        return Truth(rows, self.losses, self.n)

    def pairwise(self) -> Tensor:
        """Return the dot products of all pairs, (n, m)."""
        rows = self.vectors()
        return rows[: self.n] @ rows[self.n :].T

    def dots(self) -> Tensor:
        """Return the dot products with the mean validation gradient, (n,)."""
        return self.pairwise().mean(1)

    def dot_error(self, got: Tensor) -> float:
        """Return the maximum over i of |got_i - want_i| / (‖∇ℓ_i‖·‖∇L_val‖). got: (n,)"""
        rows = self.vectors()
        norms = rows[: self.n].norm(dim=1) * rows[self.n :].mean(0).norm()
        assert got.shape == (self.n,)
        return ((got.double() - self.dots()).abs() / norms).max().item()

    def pairwise_error(self, got: Tensor) -> float:
        """Return the maximum over i, j of |got_ij - want_ij| / (‖∇ℓ_i‖·‖∇ℓ_j‖). got: (n, m)"""
        norms = self.vectors().norm(dim=1)
        want = self.pairwise()
        assert got.shape == want.shape
        return ((got.double() - want).abs() / (norms[: self.n, None] * norms[None, self.n :])).max().item()

    def training_gradient(self) -> dict[str, Tensor]:
        """Return the gradient of the train rows' mean loss, by parameter name."""
        first, *others = self.gradients[: self.n]
        return {
            name: sum((row[name] for row in others), start=gradient) / self.n
            for name, gradient in first.items()
        }

    def gradient_error(self, model: nn.Module) -> float:
        """Return the maximum over parameters of ‖Δ‖/‖want‖, or ‖Δ‖ where ‖want‖ is zero."""
        worst = 0.0
        for name, want in self.training_gradient().items():
            got = dict(model.named_parameters())[name].grad
            got = torch.zeros_like(want) if got is None else got.double()
            scale = want.norm().item()
            worst = max(worst, (got - want).norm().item() / scale if scale > 0 else got.norm().item())
        return worst


def row_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean negative log-likelihood over the targets that are not -100 (scalar)."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    picked = [log_p[t, y[t]] for t in range(len(y)) if y[t] != -100]
    return -torch.stack(picked).mean()


def per_loss(model: nn.Module, loss: Callable[[int], Tensor], samples: int, n: int) -> Truth:
    """Compute the truth by one backward pass per sample.

    Args:
        model: in float64.
        loss: number of a sample -> its loss (scalar).
        samples: their number; the first n are train samples.
    """
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
    """Compute the truth by one backward pass per row.

    Args:
        model: in float64.
        logits: (model, one row x (1, ...)) -> (1, T, V) or (1, V).
    """

    def loss(i: int) -> Tensor:
        own = logits(model, x[i : i + 1])
        return row_loss(own.reshape(-1, own.shape[-1]), y[i].reshape(-1))

    return per_loss(model, loss, len(x), n)
