"""Descriptions: per-sample gradients in the form that a layer has them, as its rule returns them.

N is the number of samples, the n train rows before the m validation rows; `...` stands for positions. A rule
returns one description for each parameter of its layer, and the sink (sinks.py) contracts it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contraction import accumulation_dtype


@dataclass(frozen=True)
class Matrix:
    """G_i = Σ_t left_itᵀ right_it, of shape (p, d), for a parameter with p·d entries."""

    left: Tensor  # (N, ..., p)
    right: Tensor  # (N, ..., d)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return left (N, T, p) and right (N, T, d) with the positions in one dimension."""
        left, right = self.left, self.right
        if (
            left.dtype != right.dtype
        ):  # as autograd does, take the dtype of the matrix product, the narrower one
            dtype = min(left.dtype, right.dtype, key=lambda each: torch.finfo(each).bits)
            left, right = left.to(dtype), right.to(dtype)
        return (
            left.reshape(left.shape[0], -1, left.shape[-1]),
            right.reshape(right.shape[0], -1, right.shape[-1]),
        )


@dataclass(frozen=True)
class PerPosition:
    """One gradient for each position; G_i is their sum."""

    gradients: Tensor  # (N, ..., *shape)


@dataclass(frozen=True)
class PerSample:
    """The gradients G_i themselves."""

    gradients: Tensor  # (N, *shape)


@dataclass(frozen=True)
class Rows:
    """Gradients of rows of a matrix that were looked up: G_i[v] = Σ_t [tokens_it = v] gradients_it."""

    tokens: Tensor  # (N, ...) integers
    gradients: Tensor  # (N, ..., d)
    ignored: int | None = None  # a token whose row gets no gradient (padding_idx)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return tokens (N, L) and gradients (N, L, d) with the positions in one dimension."""
        tokens = self.tokens.reshape(len(self.tokens), -1)
        return tokens, self.gradients.reshape(*tokens.shape, self.gradients.shape[-1])


@dataclass(frozen=True)
class Streamed:
    """Gradients that are computed one sample at a time."""

    gradient: Callable[[int], Tensor]  # i -> G_i (*shape), for i < N
    samples: int  # N


Description = Matrix | PerPosition | PerSample | Rows | Streamed


def per_sample_sums(gradients: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum positions, (N, ..., *shape) -> (N, *shape), in float32 or wider."""
    flat = gradients.reshape(gradients.shape[0], -1, *shape)
    return flat.sum(1, dtype=torch.promote_types(gradients.dtype, torch.float32))


def joined(
    descriptions: Sequence[Description], shape: Sequence[int], *, by_position: bool = False
) -> Description:
    """Return one description of a parameter that was used several times: the sum over its uses.

    All uses are of one kind. Uses in matrix products, or in lookups, become positions of one use.

    Args:
        shape: of the parameter.
        by_position: True if gradients by position must stay apart.
    """
    first = descriptions[0]
    if len(descriptions) == 1:
        return first
    if all(isinstance(each, Matrix) for each in descriptions):
        pairs = [each.factors() for each in descriptions if isinstance(each, Matrix)]
        return Matrix(torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 1))
    if all(isinstance(each, Rows) for each in descriptions):
        lookups = [each for each in descriptions if isinstance(each, Rows)]
        return Rows(
            torch.cat([each.flat()[0] for each in lookups], 1),
            torch.cat([each.flat()[1] for each in lookups], 1),
            lookups[0].ignored,
        )
    if all(isinstance(each, Streamed) for each in descriptions):
        streams = [each for each in descriptions if isinstance(each, Streamed)]
        return Streamed(
            lambda i: torch.stack([each.gradient(i) for each in streams]).sum(0), streams[0].samples
        )
    if by_position and all(isinstance(each, PerPosition) for each in descriptions):
        written = [each.gradients for each in descriptions if isinstance(each, PerPosition)]
        return PerPosition(torch.cat([each.reshape(len(each), -1, *shape) for each in written], 1))
    return PerSample(torch.stack([whole(each, shape) for each in descriptions]).sum(0))


def whole(description: Description, shape: Sequence[int]) -> Tensor:
    """Compute the per-sample gradients (N, *shape) of a description, in float32 or wider."""
    if isinstance(description, PerSample):
        return description.gradients.to(accumulation_dtype(description.gradients.dtype))
    if isinstance(description, PerPosition):
        return per_sample_sums(description.gradients, shape)
    if isinstance(description, Matrix):
        left, right = (each.to(accumulation_dtype(each.dtype)) for each in description.factors())
        return (left.mT @ right).view(len(left), *shape)
    if isinstance(description, Streamed):
        return torch.stack([description.gradient(i) for i in range(description.samples)])
    tokens, gradients = description.flat()
    gradients = gradients.to(accumulation_dtype(gradients.dtype))
    result = gradients.new_zeros(len(gradients), *shape)
    if description.ignored is not None:
        gradients = gradients.masked_fill((tokens == description.ignored)[..., None], 0)
    return result.scatter_add_(1, tokens[..., None].expand_as(gradients), gradients)
