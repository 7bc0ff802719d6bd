"""From the values of samples to those of the documents whose text they hold.

A sample's value is divided among the documents of its T target tokens, by their share of these. Block b of a
shard predicts its tokens bT+1 to bT+T, so no token counts twice, and the values of documents add up to those
of samples.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_processing.shards import Shard
from foundation.progress import progress_bar

BATCH = 1 << 14  # samples at a time
ROW_GROUP = 1 << 17  # documents

DOCUMENT_SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "document": pa.int64(),  # its number within the domain's shard
        "first_token": pa.int64(),  # its place there
        "tokens": pa.int64(),
        "value": pa.float64(),  # null: of none of the samples with its text is there a value
        "blocks": pa.int32(),  # how many used samples have some of its text as targets
    }
)


def write_documents(samples: Path, shards: Sequence[Shard], block_size: int, target: Path) -> None:
    """samples: a Parquet file with domain, block and value, sorted by domain and block. Writes the documents
    in the same order; memory grows neither with samples nor with documents."""
    by_name = {shard.domain: shard for shard in shards}
    with (
        pq.ParquetWriter(target, DOCUMENT_SCHEMA, compression="zstd", use_dictionary=["domain"]) as writer,
        pq.ParquetFile(samples) as file,
    ):
        buffer: list[pa.Table] = []
        with progress_bar("summing documents", file.metadata.num_rows, "samples") as bar:
            for domain, pieces in groupby(pieces_of_one_domain(file), key=lambda piece: piece[0]):
                sums = DocumentSums(by_name[domain], block_size)
                for _, blocks, values in pieces:
                    buffer.append(sums.add(blocks, values))
                    bar.update(len(blocks))
                    if sum(map(len, buffer)) >= ROW_GROUP:
                        writer.write_table(pa.concat_tables(buffer))
                        buffer.clear()
                buffer.append(sums.rest())
        writer.write_table(pa.concat_tables(buffer))


Piece = tuple[str, npt.NDArray[np.int64], npt.NDArray[np.float64]]


def pieces_of_one_domain(file: pq.ParquetFile) -> Iterator[Piece]:
    """domain, blocks, values; NaN for none."""
    for batch in file.iter_batches(BATCH, columns=["domain", "block", "value"]):
        codes = batch["domain"].dictionary_encode()
        names, numbers = codes.dictionary.to_pylist(), codes.indices.to_numpy()
        blocks, values = batch["block"].to_numpy(), batch["value"].to_numpy(zero_copy_only=False)
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(cuts):
            yield names[numbers[start]], blocks[start:end], values[start:end]


class DocumentSums:
    """The sums of one shard's documents, of samples that come in the order of their blocks: a document is
    done as soon as the next one begins."""

    def __init__(self, shard: Shard, block_size: int) -> None:
        self._shard, self._block_size = shard, block_size
        # Of the document that may go on in the next samples; valued: how many of its blocks have a value.
        self._open = {
            "document": np.empty(0, np.int64),
            "value": np.empty(0),
            "valued": np.empty(0, np.int64),
            "blocks": np.empty(0, np.int64),
        }

    def add(self, blocks: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> pa.Table:
        """blocks, values: (n,) of the next samples, NaN for no value. Returns the documents that are done."""
        rows, documents, parts = shares(self._shard, self._block_size, blocks)
        there = ~np.isnan(values[rows])
        new = {
            "document": documents,
            "value": np.where(there, values[rows], 0) * parts,
            "valued": there.astype(np.int64),
            "blocks": np.ones(len(rows), np.int64),
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
        """The last document."""
        return self._table(self._open)

    def _table(self, sums: dict[str, npt.NDArray[Any]]) -> pa.Table:
        first, end = bounds(self._shard, sums["document"])
        columns = {
            "domain": pa.repeat(pa.scalar(self._shard.domain), len(first)),
            "document": sums["document"],
            "first_token": first,
            "tokens": end - first,
            "value": pa.array(sums["value"], mask=sums["valued"] == 0),
            "blocks": sums["blocks"].astype(np.int32),
        }
        return pa.table(columns, schema=DOCUMENT_SCHEMA)


def bounds(
    shard: Shard, documents: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The places of the documents' first tokens, and behind their last."""
    following = np.minimum(documents + 1, shard.num_documents - 1)
    is_last = documents == shard.num_documents - 1
    return shard.document_starts[documents], np.where(
        is_last, shard.num_tokens, shard.document_starts[following]
    )


def shares(
    shard: Shard, block_size: int, blocks: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Which documents the targets of n blocks are of: (pairs,) each, the place in `blocks`, the document, and
    its share of the block's targets. Sorted, if `blocks` is."""
    begin = blocks * block_size + 1
    end = begin + block_size
    first = np.searchsorted(shard.document_starts, begin, "right") - 1
    last = np.searchsorted(shard.document_starts, end - 1, "right") - 1
    counts = last - first + 1
    rows = np.repeat(np.arange(len(blocks)), counts)
    documents = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts - first, counts)
    starts, ends = bounds(shard, documents)
    return rows, documents, (np.minimum(ends, end[rows]) - np.maximum(starts, begin[rows])) / block_size
