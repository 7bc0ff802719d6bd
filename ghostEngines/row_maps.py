"""Row maps: which sample each entry of a layer's first dimensions belongs to.

    Identity   entry r belongs to sample r
    Flat       one sample after the other, with the same number of entries each: (N·K, ...)
    Indexed    any order: an index has the sample of each entry

A row map brings tensors, and the descriptions made of them, into the form (N, positions, ...). The engine
derives a layer's row map from the shape of its input and the samples of the step (`Samples`). The guard
(guard.py) checks that the model agrees. The user can give any other map.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .descriptions import Description, Matrix, PerPosition, Rows, Streamed


class RowMap(Protocol):
    """The sample of each entry of a layer's first dimensions."""

    def to_rows(self, entries: Tensor) -> Tensor:
        """Return entries (R, ...) as (N, positions, ...), with zeros where a sample has fewer positions."""

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        """Return the value of each entry, given a value for each sample (N,).

        Args:
            entries: the size of the first dimension.
        """


@dataclass(frozen=True)
class Identity:
    """The first dimension is the sample."""

    def to_rows(self, entries: Tensor) -> Tensor:
        return entries

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        return of_sample


ROWS = Identity()


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
    """Entry r belongs to sample rows[r]."""

    rows: Tensor  # integers, of the shape of the first dimensions: one or several
    samples: int  # N

    def to_rows(self, entries: Tensor) -> Tensor:
        places, longest = self._places
        flat = entries.flatten(0, self.rows.dim() - 1)
        padded = flat.new_zeros(self.samples * longest, *flat.shape[1:]).index_copy(0, places, flat)
        rows: Tensor = padded.unflatten(0, (self.samples, longest))
        return rows

    def of_rows(self, of_sample: Tensor, entries: int) -> Tensor:
        return of_sample[self.rows]

    @cached_property
    def _places(self) -> tuple[Tensor, int]:
        """Return where each entry goes (R,), and the largest number of entries of a sample. A device sync."""
        rows = self.rows.flatten()
        order = torch.argsort(rows, stable=True)
        counts = torch.bincount(rows, minlength=self.samples)
        longest = int(counts.max())
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(order)
        within[order] = torch.arange(len(order), device=order.device) - starts[rows[order]]
        return rows * longest + within, longest


class Samples:
    """The samples of a step: rows of the model's input, or what an index assigns to each sample."""

    def __init__(self, count: int, index: Tensor | None = None) -> None:
        """Describe the samples.

        Args:
            count: N. The n train samples come before the m validation samples.
            index: the sample of each of the R rows (R,), or of each position (R, T); None: row i is sample i.
        """
        self.count, self.index = count, index
        self._maps: list[Indexed] = []
        if index is not None:
            self._maps = [Indexed(index, count), Indexed(index.flatten(), count)]

    @property
    def rows(self) -> int:
        """Return R, the number of rows of the model's input."""
        return self.count if self.index is None else len(self.index)

    @property
    def of_positions(self) -> bool:
        """Return whether the positions of one row may belong to several samples."""
        return self.index is not None and self.index.dim() == 2

    @classmethod
    def indexed(cls, index: Any, shape: torch.Size) -> "Samples":
        """Return the samples of an index that a user gives for an input of this shape. Waits for the device.

        Raises:
            ValueError: a wrong type or shape, or a sample without an entry.
        """
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dim() not in (1, 2):
            raise ValueError(
                "samples must return integers (rows,) or (rows, positions), the sample of each row or position; "
                f"got {tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__}"
            )
        if index.shape != shape[: index.dim()]:
            raise ValueError(
                f"samples returned {tuple(index.shape)} for a model input of shape {tuple(shape)}: give one sample "
                "for each row, or for each position of each row"
            )
        if index.numel() == 0 or int(index.min()) < 0:
            raise ValueError(
                "samples are numbered from 0, train samples first; padding belongs to the sample before it"
            )
        counts = torch.bincount(index.flatten())
        if int(counts.min()) == 0:
            raise ValueError(
                f"sample {int(counts.argmin())} of {len(counts)} has no entry in the model's input: number the "
                "samples without gaps"
            )
        return cls(len(counts), index)

    def row_map(self, shape: torch.Size, *, of_result: bool = False) -> RowMap | None:
        """Return the row map of a tensor of this shape; None if it has no sample dimension.

        Args:
            of_result: True if the tensor was computed from the samples' entries, so that even its only
                dimension may be the flattened entries.
        """
        if len(shape) == 0 or shape[0] == 0:
            return None
        if self.count == 1:  # every entry belongs to the one sample
            return ROWS if shape[0] == 1 else Flat(1)
        if self.index is not None:
            for each in self._maps:
                if shape[: each.rows.dim()] == each.rows.shape:
                    return each
        elif shape[0] == self.count:
            return ROWS
        if (len(shape) == 1 and not of_result) or shape[0] % self.rows != 0 or self.of_positions:
            return None
        if self.index is None:
            return Flat(self.count)
        return Indexed(self.index.repeat_interleave(shape[0] // self.rows), self.count)


def packed_documents(position_ids: Tensor, **_: Any) -> Tensor:
    """Return the document of each position (R, T), for the engine's option `samples`.

    Position ids must restart at 0 with every document. It takes the arguments of a Hugging Face model.
    """
    documents: Tensor = (position_ids == 0).flatten().cumsum(0) - 1
    return documents.view_as(position_ids)


def by_sample(description: Description, row_map: RowMap) -> Description:
    """Return a description by sample, given one by entry."""
    if isinstance(row_map, Identity) or isinstance(description, Streamed):
        return description
    to_rows = row_map.to_rows
    if isinstance(description, Matrix):
        return Matrix(to_rows(description.left), to_rows(description.right))
    if isinstance(description, Rows):
        return Rows(to_rows(description.tokens), to_rows(description.gradients), description.ignored)
    return PerPosition(to_rows(description.gradients))
