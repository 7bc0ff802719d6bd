"""Row maps: which sample each entry of a layer's first dimension belongs to.

    Identity   entry r is sample r
    Flat       samples one after the other, the same number of entries each: (N·K, ...)
    Indexed    any order: a sample for each entry

A row map puts tensors, and descriptions made of them, into the form (N, positions, ...). The engine takes
Identity and Flat from an input's first dimension, and its guard (guard.py) checks that this is what the model
does; any other map is given by the user.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .descriptions import Description, Matrix, PerPosition, Rows, Streamed


class RowMap(Protocol):
    """Where the entries of a layer's first dimension belong."""

    def to_rows(self, entries: Tensor) -> Tensor:
        """(R, ...) -> (N, positions, ...), zeros where a sample has fewer positions."""

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        """Return, of a value for each sample (N,), the value of each of the R entries."""


@dataclass(frozen=True)
class Identity:
    """The first dimension is the sample."""

    def to_rows(self, entries: Tensor) -> Tensor:
        return entries

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        return of_sample


@dataclass(frozen=True)
class Flat:
    """Sample i has the entries i·K to (i+1)·K - 1."""

    samples: int

    def to_rows(self, entries: Tensor) -> Tensor:
        rows: Tensor = entries.unflatten(0, (self.samples, -1))
        return rows

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        return of_sample.repeat_interleave(entries // self.samples)


@dataclass(frozen=True, eq=False)
class Indexed:
    """Entry r is of sample rows[r] (R,); samples: N."""

    rows: Tensor
    samples: int

    def to_rows(self, entries: Tensor) -> Tensor:
        places, longest = self._places()
        padded = entries.new_zeros(self.samples * longest, *entries.shape[1:])
        padded = padded.index_copy(0, places, entries)
        rows: Tensor = padded.unflatten(0, (self.samples, longest))
        return rows

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        return of_sample[self.rows]

    def _places(self) -> tuple[Tensor, int]:
        """(R,) where each entry goes, and the largest number of entries of a sample. Waits for the device."""
        order = torch.argsort(self.rows, stable=True)
        counts = torch.bincount(self.rows, minlength=self.samples)
        longest = int(counts.max())
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(order)
        within[order] = torch.arange(len(order), device=order.device) - starts[self.rows[order]]
        return self.rows * longest + within, longest


def by_sample(description: Description, row_map: RowMap) -> Description:
    """Return the description of samples for one of entries."""
    if isinstance(row_map, Identity) or isinstance(description, Streamed):
        return description
    to_rows = row_map.to_rows
    if isinstance(description, Matrix):
        return Matrix(to_rows(description.left), to_rows(description.right))
    if isinstance(description, Rows):
        return Rows(to_rows(description.tokens), to_rows(description.gradients), description.ignored)
    return PerPosition(to_rows(description.gradients))
