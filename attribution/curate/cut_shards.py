"""A shard without some of its tokens, read and written in windows: memory does not grow with it."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_processing.shards import EOT, TOKEN_TYPE, Shard, ShardWriter

WINDOW_TOKENS = 1 << 22

Ranges = npt.NDArray[np.int64]  # (k, 2) of token positions: start and stop, ascending and apart


def cut(shard: Shard, dropped: Iterable[Ranges], writer: ShardWriter, bar: tqdm) -> None:
    """Writes the shard's tokens that are in none of the ranges, in their order.

    A document of the result starts where one of the shard does, and at each gap: its first part is gone. The
    last one gets an END_OF_TEXT if its own is gone. The bar advances by the bytes that were read.
    """
    kept_before, last = True, EOT
    with shard.path.with_suffix(".bin").open("rb") as file:  # what a map has read would stay in memory
        for first, ranges in _windows(dropped, shard.num_tokens):
            tokens = np.fromfile(file, TOKEN_TYPE, min(WINDOW_TOKENS, shard.num_tokens - first))
            keep = _kept(ranges - first, len(tokens))
            begins = keep & ~np.append(kept_before, keep[:-1])
            own = np.searchsorted(shard.document_starts, [first, first + len(tokens)])
            begins[shard.document_starts[own[0] : own[1]] - first] = True
            kept_before = keep[-1]
            if keep.any():
                left = tokens[keep]
                last = left[-1]
                writer.extend_cut(left, np.flatnonzero(begins[keep]))
            bar.update(tokens.nbytes)
    if last != EOT:
        writer.extend_cut(np.array([EOT], TOKEN_TYPE), np.empty(0, np.int64))


def _windows(dropped: Iterable[Ranges], num_tokens: int) -> Iterator[tuple[int, Ranges]]:
    """The first position of each window, with the ranges that reach into it."""
    coming, more = iter(dropped), True
    waiting = np.empty((0, 2), np.int64)
    for first in range(0, num_tokens, WINDOW_TOKENS):
        stop = first + WINDOW_TOKENS
        while more and (len(waiting) == 0 or waiting[-1, 0] < stop):
            batch = next(coming, None)
            more = batch is not None
            waiting = waiting if batch is None else np.concatenate([waiting, batch])
        yield first, waiting[: np.searchsorted(waiting[:, 0], stop)]
        waiting = waiting[waiting[:, 1] > stop]


def _kept(ranges: Ranges, length: int) -> npt.NDArray[np.bool_]:
    """(length,): which positions are in none of the ranges, of which the first and the last may reach out."""
    change = np.zeros(length + 1, np.int8)
    change[np.maximum(ranges[:, 0], 0)] += 1
    change[np.minimum(ranges[:, 1], length)] -= 1
    return np.cumsum(change[:-1], dtype=np.int8) == 0
