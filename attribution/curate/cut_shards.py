"""Copy a shard without some of its tokens, in windows: memory does not grow with the shard."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_processing.shards import Shard, ShardWriter

WINDOW_TOKENS = 1 << 22

Ranges = npt.NDArray[np.int64]  # (k, 2) start and stop, in tokens; ascending, no two overlap


def cut_shard(shard: Shard, dropped: Iterable[Ranges], writer: ShardWriter, bar: tqdm) -> None:
    """Write the shard's tokens outside of the ranges, in order. The bar advances by the bytes read.

    A document of the result starts where a document of the shard does, and after each dropped range. The last
    document gets an END_OF_TEXT if its own was dropped.
    """
    end, token_type = shard.ids.end_of_text, shard.ids.token_type
    kept_before, last = True, end
    # Read the file, not the memory map: its pages would stay in memory.
    with shard.path.with_suffix(".bin").open("rb") as file:
        for first, ranges in _windows(dropped, shard.num_tokens):
            tokens = np.fromfile(file, token_type, min(WINDOW_TOKENS, shard.num_tokens - first))
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
    if last != end:
        writer.extend_cut(np.array([end], token_type), np.empty(0, np.int64))


def _windows(dropped: Iterable[Ranges], num_tokens: int) -> Iterator[tuple[int, Ranges]]:
    """Yield the first position of each window, with the ranges that overlap it."""
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
    """Return (length,) bool, true outside of all ranges. The first and last range may exceed [0, length)."""
    change = np.zeros(length + 1, np.int8)
    change[np.maximum(ranges[:, 0], 0)] += 1
    change[np.minimum(ranges[:, 1], length)] -= 1
    kept: npt.NDArray[np.bool_] = np.cumsum(change[:-1], dtype=np.int8) == 0
    return kept
