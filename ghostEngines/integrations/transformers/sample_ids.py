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
        check_rows(dataset, "train_dataset")
        for name in (sample_id, group):
            if name is not None and name not in (columns := _columns(dataset)):
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


def check_rows(dataset: Any, name: str) -> None:
    """Raise UserError unless the rows of a dataset have places.

    Args:
        name: of the argument, for the message.
    """
    if dataset is None:
        raise UserError(f"give {name}")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{name} is a {type(dataset).__name__} without a length: its rows have no places that could be ids. "
            "Give a dataset with a length (for `datasets`: one that is not streamed)"
        )
    if len(dataset) == 0:
        raise UserError(f"{name} is empty")


def _columns(dataset: Any) -> list[str]:
    return list(dataset.column_names if hasattr(dataset, "column_names") else dataset[0])


def _column(dataset: Any, name: str) -> list[Any]:
    if hasattr(dataset, "with_format"):  # of the library `datasets`: without what it makes of its rows
        return list(dataset.with_format(None)[name])
    return [dataset[row][name] for row in range(len(dataset))]


class _Numbered(Dataset[dict[str, Any]]):
    """A dataset whose items, dictionaries, have their place in it, too."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.dataset[row], ROW: row}


def numbered(dataset: Any) -> Any:
    """Return the dataset with the column ROW. Raises UserError if it has a column of that name."""
    if ROW in _columns(dataset):
        raise UserError(f"the dataset has a column {ROW!r}, which scoring needs for itself: rename it")
    if hasattr(dataset, "add_column") and dataset.format["type"] != "custom":  # of the library `datasets`
        return dataset.add_column(ROW, np.arange(len(dataset)))
    return _Numbered(dataset)


@dataclass(frozen=True, eq=False)
class Origin:
    """What the samples of a batch were made of. No list: nothing that moves batches to a device looks into it."""

    rows: npt.NDArray[np.int64]  # (n,) their places in the dataset
    tokens: list[
        list[int]
    ]  # of each; empty where rows are packed, so that a part of a sample may be in the batch


class NumberedCollator:
    """A collator that passes the column ROW by the one that it wraps, which may know its own columns alone."""

    def __init__(self, collator: Callable[[Features], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: Features) -> dict[str, Any]:
        if not all(ROW in feature for feature in features):  # of an evaluation
            return self.collator(features)
        rows = [row for feature in features for row in _rows(feature)]
        packed = any(isinstance(feature[ROW], list) for feature in features)
        if not packed and not all("input_ids" in feature for feature in features):
            raise UserError(f"a row of the dataset has no input_ids; it has {', '.join(features[0])}")
        tokens = [] if packed else [tokens_of(feature) for feature in features]
        batch = self.collator([{k: v for k, v in feature.items() if k != ROW} for feature in features])
        if not packed and len(batch["input_ids"]) == len(tokens):
            check_order(batch["input_ids"].tolist(), tokens)
        batch[ROW] = Origin(np.asarray(rows), tokens)
        return batch


def check_order(rows: list[list[int]], tokens: list[list[int]]) -> None:
    """Raise UserError if a collator has put the rows into another order.

    Args:
        rows: of the batch, padded.
        tokens: of the features that they were made of; a collator may cut or change them.
    """

    def has(row: list[int], own: list[int]) -> bool:
        return any(row[start : start + len(own)] == own for start in range(len(row) - len(own) + 1))

    for place, own in enumerate(tokens):
        if not has(rows[place], own) and any(has(row, own) for row in rows):
            raise UserError(
                "the collator changes the order of the rows, so that scores would be those of other samples: let it "
                "keep the order of its features"
            )


def tokens_of(feature: dict[str, Any]) -> list[int]:
    """Return the token ids of a row of a dataset."""
    tokens = feature["input_ids"]
    return tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)


def _rows(feature: dict[str, Any]) -> list[int]:
    """Return the places of the samples in one row, in order; `seq_lengths` are those of samples packed into it."""
    if not isinstance(feature[ROW], list):
        return [int(feature[ROW])]
    starts = accumulate(feature["seq_lengths"][:-1], initial=0)
    return [feature[ROW][start] for start in starts]
