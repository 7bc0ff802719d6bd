"""Find a text in shards of tokens, byte by byte, because its tokens depend on the text around it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from attribution.documents import locate_document
from data_processing.shard_files import ShardError
from data_processing.shards import Shard, Tokens
from data_processing.tokenizers import Tokenizer
from foundation.progress import progress_bar

CHUNK_TOKENS = 1 << 20  # decoded at a time: about 4 MB of text, with ten times as much while decoding
NO_TEXT = b"\xff"  # the bytes of END_OF_TEXT: UTF-8 never has this byte, so no match spans two documents


@dataclass(frozen=True)
class Place:
    """The first occurrence of a text in a document."""

    domain: str
    document: int  # number within the domain
    first_token: int  # of the shard, in which the text begins
    stop_token: int  # after the token in which it ends


class TokenBytes:
    """Decode token ids to bytes by array indexing, without a Python object per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        table, ids = tokenizer.token_bytes(), tokenizer.ids
        assert len(table) == ids.vocabulary, len(table)
        for between in (ids.end_of_text, ids.begin_of_text):
            if between is not None:
                table[between] = NO_TEXT
        self._lengths = np.zeros(max(1 << 16, ids.vocabulary), np.int64)
        self._lengths[: len(table)] = [len(entry) for entry in table]
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._pool = np.frombuffer(b"".join(table), np.uint8)

    def join(self, ids: Tokens) -> tuple[bytes, npt.NDArray[np.int64]]:
        """Return the bytes of k tokens, and the position after each token's bytes, (k,).

        Raises ShardError for an id that the tokenizer does not have.
        """
        if ids.max() >= len(self._lengths):
            raise ShardError(f"token id {ids.max()} is none of this tokenizer's: a damaged shard")
        lengths = self._lengths[ids]
        if not lengths.all():
            raise ShardError(f"token id {ids[lengths.argmin()]} is none of this tokenizer's: a damaged shard")
        ends = np.cumsum(lengths)
        places = np.repeat(self._starts[ids] - (ends - lengths), lengths)
        places += np.arange(ends[-1])
        return self._pool[places].tobytes(), ends


def find_documents(shards: Sequence[Shard], text: str, tokenizer: Tokenizer) -> Iterator[Place]:
    """Yield each document that contains the text, in the order of the shards, with a progress bar.

    Memory does not grow with the shards. Raises ShardError for a damaged shard.
    """
    pattern, table = text.encode("utf-8"), TokenBytes(tokenizer)
    assert pattern, "an empty text is everywhere"
    total = sum(shard.num_tokens for shard in shards)
    with progress_bar("searching", total, "tokens") as bar:
        for shard in shards:
            yield from _find_in_shard(shard, pattern, table, bar)


def _find_in_shard(shard: Shard, pattern: bytes, table: TokenBytes, bar: tqdm) -> Iterator[Place]:
    step = max(CHUNK_TOKENS, len(pattern))
    done = -1  # the last document that was found
    for first, ids in _chunks(shard, step, step + len(pattern)):
        # A token has at least one byte, so a match that begins in the first `step` tokens ends in this chunk.
        data, ends = table.join(ids)
        begin_before = ends[min(step, len(ends)) - 1]
        found = data.find(pattern)
        while 0 <= found < begin_before:
            begin, last = np.searchsorted(ends, [found, found + len(pattern) - 1], side="right").tolist()
            document = int(np.searchsorted(shard.document_starts, first + begin, "right")) - 1
            document_stop = locate_document(shard, document)[1] - first
            # In curated shards a document can begin without an END_OF_TEXT before it.
            inside = last < document_stop
            if inside and document > done:
                done = document
                yield Place(shard.domain, document, first + begin, first + last + 1)
            if inside and document_stop > len(ends):
                break
            found = data.find(pattern, int(ends[document_stop - 1]) if inside else found + 1)
        bar.update(min(step, shard.num_tokens - first))


def _chunks(shard: Shard, step: int, length: int) -> Iterator[tuple[int, Tokens]]:
    """Yield, every `step` tokens, the position and the next `length` tokens (fewer at the shard's end)."""
    # Read the file, not the memory map: its pages would stay in memory.
    token_type = shard.ids.token_type
    with shard.path.with_suffix(".bin").open("rb") as file:
        for first in range(0, shard.num_tokens, step):
            file.seek(first * token_type.itemsize)
            yield first, np.fromfile(file, token_type, length)
