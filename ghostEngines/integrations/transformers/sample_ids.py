"""Sample ids that survive what a Trainer does to a dataset: dropped columns, filters, shuffles, packing, collators."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from foundation.errors import UserError

ROW = "ghost_row"
"""The column with a row's place in the dataset that the user gave; in packed rows, a list with one entry a token."""

Features = list[dict[str, Any]]


@dataclass(frozen=True)
class Identities:
    """The id and the group of each row of the user's dataset."""

    ids: npt.NDArray[np.int64]
    groups: Sequence[str] | None  # None: all are in one group

    @classmethod
    def of(cls, dataset: Any, sample_id: str | None, group: str | None) -> "Identities":
        """Read them from the columns that the user names; without `sample_id` a row's place is its id.

        Raises:
            UserError: a column is missing, or ids are not integers, or repeat.
        """
        columns = getattr(dataset, "column_names", None)
        for name in (sample_id, group):
            if name is not None and columns is not None and name not in columns:
                raise UserError(f"the dataset has no column {name!r}; it has {', '.join(columns)}")
        groups = None if group is None else [str(each) for each in _column(dataset, group)]
        if sample_id is None:
            return cls(np.arange(len(dataset)), groups)
        ids = np.asarray(_column(dataset, sample_id))
        if ids.dtype.kind != "i":
            raise UserError(f"the ids in column {sample_id!r} are not integers, but {ids.dtype}")
        if len(np.unique(ids)) < len(ids):
            ((repeated, times),) = Counter(ids.tolist()).most_common(1)
            raise UserError(
                f"the id {repeated} is {times} times in column {sample_id!r}: each sample needs an id of its own"
            )
        return cls(ids.astype(np.int64), groups)

    def group(self, row: int) -> str:
        """Return the group of a row."""
        return "all" if self.groups is None else self.groups[row]


def _column(dataset: Any, name: str) -> list[Any]:
    return list(dataset[name]) if hasattr(dataset, "column_names") else [row[name] for row in dataset]


class _Numbered(Dataset[dict[str, Any]]):
    """A dataset whose items, dictionaries, have their place in it, too."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.dataset[row], ROW: row}


def numbered(dataset: Any) -> Any:
    """Return the dataset with the column ROW.

    Raises:
        UserError: it has no length, so that its rows have no places.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"train_dataset is a {type(dataset).__name__} without a length: its rows have no places that could be ids. "
            "Give a dataset with a length (for `datasets`: one that is not streamed)"
        )
    if hasattr(dataset, "add_column"):  # of the library `datasets`
        return dataset.add_column(ROW, np.arange(len(dataset)))
    return _Numbered(dataset)


class NumberedCollator:
    """A collator that passes the column ROW by the one that it wraps, which may know its own columns alone."""

    def __init__(self, collator: Callable[[Features], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: Features) -> dict[str, Any]:
        if not all(ROW in feature for feature in features):  # of an evaluation
            return self.collator(features)
        rows = [row for feature in features for row in _rows(feature)]
        batch = self.collator([{k: v for k, v in feature.items() if k != ROW} for feature in features])
        batch[ROW] = rows  # no tensor: nobody has to wait for the device to read it
        return batch


def _rows(feature: dict[str, Any]) -> list[int]:
    """Return the places of the samples in one row, in order; `seq_lengths` are those of samples packed into it."""
    if not isinstance(feature[ROW], list):
        return [feature[ROW]]
    starts = accumulate(feature["seq_lengths"][:-1], initial=0)
    return [feature[ROW][start] for start in starts]
