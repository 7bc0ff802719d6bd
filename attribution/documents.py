"""Divide the values of samples among the documents in them.

Block b has T targets, the shard's tokens bT+1 to bT+T, and T inputs, its tokens bT to bT+T-1. No token is a target
twice, nor an input twice. Where the scores split a value by target, part t belongs to the document of the token that is
target t; where they split it by position, to the document of the token that is input t. Where they do not, each
document gets the share of the block's value that it has of the block's targets. So the documents' values add up to the
samples'.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attribution.errors import AttributionError
from data_processing.shards import Shard
from foundation.progress import progress_bar
from score_store.schema import WordSplit

BATCH = 1 << 14  # samples at a time
FIRST: dict[WordSplit | None, int] = {"target": 1, "position": 0, None: 1}  # token of a block that is divided
ROW_GROUP = 1 << 17  # documents

DOCUMENT_SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "document": pa.int64(),  # its number within the domain's shard
        "first_token": pa.int64(),  # its position in the shard
        "tokens": pa.int64(),
        "value": pa.float64(),  # null: no sample with its text has a value
        "blocks": pa.int32(),  # number of used samples that have some of its text as targets (by position: as input)
    }
)


def write_no_documents(target: Path) -> None:
    """Write the table of samples that have no documents in them."""
    pq.write_table(DOCUMENT_SCHEMA.empty_table(), target)


def write_documents(
    samples: Path, shards: Sequence[Shard], block_size: int, target: Path, by_word: WordSplit | None = None
) -> None:
    """Write the values of all documents that a sample touches, sorted by domain and document.

    Memory does not grow with the number of samples or documents.

    Args:
        samples: a Parquet file with domain, block and value, and parts with a split by word, sorted by domain and
            block.
        shards: whose documents they are.
        target: the Parquet file to write, with DOCUMENT_SCHEMA.
        by_word: the split.

    Raises:
        AttributionError: a block has another number of parts than of tokens.
    """
    by_name = {shard.domain: shard for shard in shards}
    with (
        pq.ParquetWriter(target, DOCUMENT_SCHEMA, compression="zstd", use_dictionary=["domain"]) as writer,
        pq.ParquetFile(samples) as file,
    ):
        buffer: list[pa.Table] = []
        with progress_bar("summing documents", file.metadata.num_rows, "samples") as bar:
            for domain, pieces in groupby(read_pieces(file, by_word), key=lambda piece: piece[0]):
                sums = DocumentSums(by_name[domain], block_size, by_word)
                for _, blocks, values, parts in pieces:
                    buffer.append(sums.add(blocks, values, parts))
                    bar.update(len(blocks))
                    if sum(map(len, buffer)) >= ROW_GROUP:
                        writer.write_table(pa.concat_tables(buffer))
                        buffer.clear()
                buffer.append(sums.rest())
        writer.write_table(pa.concat_tables(buffer))


# domain, blocks, values (NaN: none), parts
Piece = tuple[str, npt.NDArray[np.int64], npt.NDArray[np.float64], pa.ListArray | None]


def read_pieces(file: pq.ParquetFile, by_word: WordSplit | None) -> Iterator[Piece]:
    """Yield the samples of a file in pieces of one domain."""
    columns = ["domain", "block", "value", *([] if by_word is None else ["parts"])]
    # One reader of all row groups would keep what it has read.
    groups = (file.iter_batches(BATCH, [group], columns) for group in range(file.num_row_groups))
    for batch in chain.from_iterable(groups):
        codes = batch["domain"].dictionary_encode()
        names, numbers = codes.dictionary.to_pylist(), codes.indices.to_numpy()
        blocks, values = batch["block"].to_numpy(), batch["value"].to_numpy(zero_copy_only=False)
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(cuts):
            parts = None if by_word is None else batch["parts"].slice(start, end - start)
            yield names[numbers[start]], blocks[start:end], values[start:end], parts


class DocumentSums:
    """Sum the values of one shard's documents.

    Samples come in the order of their blocks, so a document is complete as soon as the next one begins.
    """

    def __init__(self, shard: Shard, block_size: int, by_word: WordSplit | None) -> None:
        self._shard, self._block_size, self._by_word = shard, block_size, by_word
        # The document that may continue in the next samples.
        self._open: dict[str, npt.NDArray[Any]] = {
            "document": np.empty(0, np.int64),
            "value": np.empty(0),
            "valued": np.empty(0, np.int64),  # number of its blocks with a value
            "blocks": np.empty(0, np.int64),
        }

    def add(
        self, blocks: npt.NDArray[np.int64], values: npt.NDArray[np.float64], parts: pa.ListArray | None
    ) -> pa.Table:
        """Add the next samples and return the documents that are complete.

        Args:
            blocks: (n,)
            values: (n,) NaN for none.
            parts: (n,) lists, of a split by word.
        """
        pairs = divide_blocks(self._shard, self._block_size, blocks, self._by_word)
        each = pairs.divide(values, parts)
        new = {
            "document": pairs.documents,
            "value": np.nan_to_num(each),
            "valued": (~np.isnan(each)).astype(np.int64),
            "blocks": np.ones(len(each), np.int64),
        }
        columns = {name: np.concatenate([self._open[name], new[name]]) for name in new}
        starts = np.flatnonzero(np.diff(columns["document"], prepend=-1))
        sums = {
            name: np.add.reduceat(column, starts) for name, column in columns.items() if name != "document"
        }
        sums["document"] = columns["document"][starts]
        self._open = {name: column[-1:] for name, column in sums.items()}
        return self._table({name: column[:-1] for name, column in sums.items()})

    def rest(self) -> pa.Table:
        """Return the last document."""
        return self._table(self._open)

    def _table(self, sums: dict[str, npt.NDArray[Any]]) -> pa.Table:
        first, end = locate_documents(self._shard, sums["document"])
        columns = {
            "domain": pa.repeat(pa.scalar(self._shard.domain), len(first)),
            "document": sums["document"],
            "first_token": first,
            "tokens": end - first,
            "value": pa.array(sums["value"], mask=sums["valued"] == 0),
            "blocks": sums["blocks"].astype(np.int32),
        }
        return pa.table(columns, schema=DOCUMENT_SCHEMA)


def locate_documents(
    shard: Shard, documents: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the documents start and stop in the shard, in tokens. All arrays are (k,)."""
    following = np.minimum(documents + 1, shard.num_documents - 1)
    is_last = documents == shard.num_documents - 1
    return shard.document_starts[documents], np.where(
        is_last, shard.num_tokens, shard.document_starts[following]
    )


def locate_document(shard: Shard, document: int) -> tuple[int, int]:
    """Return where one document starts and stops in the shard, in tokens."""
    starts, stops = locate_documents(shard, np.array([document]))
    return int(starts[0]), int(stops[0])


@dataclass(frozen=True)
class Pairs:
    """All pairs of a block and a document that has some of its targets (by position: inputs), sorted by both."""

    rows: npt.NDArray[np.int64]  # (pairs,) the index of the block
    documents: npt.NDArray[np.int64]  # (pairs,)
    first: npt.NDArray[
        np.int64
    ]  # (pairs,) the first of the block's T targets or inputs that is the document's
    shares: npt.NDArray[np.float64]  # (pairs,) of these T
    block_size: int

    def divide(self, values: npt.NDArray[np.float64], parts: pa.ListArray | None) -> npt.NDArray[np.float64]:
        """Return each pair's part of its block's value.

        Args:
            values: of the blocks, NaN for none.
            parts: lists of T numbers that add up to them, null for none; None: the value is divided by the shares.

        Raises:
            AttributionError: a list has not T numbers.
        """
        by_share = values[self.rows] * self.shares
        if parts is None or len(values) == 0:
            return by_share
        lengths = pc.list_value_length(parts.drop_null())
        if len(lengths) and (wrong := set(lengths.unique().to_pylist()) - {self.block_size}):
            raise AttributionError(
                f"a block of {self.block_size} tokens has {min(wrong)} parts of its value: the scores are damaged; "
                "copy the folder again, or repeat the run"
            )
        there = parts.is_valid().to_numpy(
            zero_copy_only=False
        )  # no use of weight zero has parts, and its value is 0
        numbers = np.zeros((len(parts), self.block_size))
        numbers[there] = parts.flatten().to_numpy().reshape(-1, self.block_size)
        sums = np.add.reduceat(numbers.ravel(), self.rows * self.block_size + self.first)
        return np.where(there[self.rows], sums, by_share)


def divide_blocks(
    shard: Shard, block_size: int, blocks: npt.NDArray[np.int64], by_word: WordSplit | None = None
) -> Pairs:
    """Return all pairs of a block and a document that has some of what is divided.

    Args:
        blocks: (n,)
        by_word: the split by which: "position" divides the block's inputs, the others its targets.
    """
    begin = blocks * block_size + FIRST[by_word]
    end = begin + block_size
    first = np.searchsorted(shard.document_starts, begin, "right") - 1
    last = np.searchsorted(shard.document_starts, end - 1, "right") - 1
    counts = last - first + 1
    rows = np.repeat(np.arange(len(blocks)), counts)
    documents = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts - first, counts)
    starts, ends = locate_documents(shard, documents)
    starts, ends = np.maximum(starts, begin[rows]), np.minimum(ends, end[rows])
    return Pairs(rows, documents, starts - begin[rows], (ends - starts) / block_size, block_size)
