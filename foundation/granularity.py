"""The granularities of a score, and how the finer ones add up to one dot product for each sample."""

from typing import Any, Literal

Granularity = Literal["total", "pairwise", "per_layer", "token"]
GRANULARITIES: tuple[Granularity, ...] = ("total", "pairwise", "per_layer", "token")


def parts_per_sample(granularity: Granularity, val_batch_size: int, layers: int, positions: int) -> int:
    """Return how many numbers a sample's score has beside its dot product."""
    return {"total": 0, "pairwise": val_batch_size, "per_layer": layers, "token": positions}[granularity]


def total_of(scores: Any, granularity: Granularity) -> Any:
    """Return the dot product of each sample (n,), of scores (n,), (n, m), (n, layers) or (n, T), tensors or
    arrays: the mean over validation rows, or the sum over layers or positions."""
    if granularity == "total":
        return scores
    return scores.mean(1) if granularity == "pairwise" else scores.sum(1)
