"""Divide the values of samples among the documents in them.

Each document gets the share of a sample's value that it has of the sample's T target tokens. The targets of
block b are the shard's tokens bT+1 to bT+T. No token is a target twice, so the documents' values add up to
the samples'.
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
        "first_token": pa.int64(),  # its position in the shard
        "tokens": pa.int64(),
        "value": pa.float64(),  # null: no sample with its text has a value
        "blocks": pa.int32(),  # number of used samples that have some of its text as targets
    }
)


def write_no_documents(target: Path) -> None:
    """Write the table of samples that have no documents in them."""
    pq.write_table(DOCUMENT_SCHEMA.empty_table(), target)


def write_documents(samples: Path, shards: Sequence[Shard], block_size: int, target: Path) -> None:
    """Write the values of all documents that a sample touches, sorted by domain and document.

    Memory does not grow with the number of samples or documents.

    Args:
        samples: a Parquet file with domain, block and value, sorted by domain and block.
        shards: whose documents they are.
        target: the Parquet file to write, with DOCUMENT_SCHEMA.
    """
    by_name = {shard.domain: shard for shard in shards}
    with (
        pq.ParquetWriter(target, DOCUMENT_SCHEMA, compression="zstd", use_dictionary=["domain"]) as writer,
        pq.ParquetFile(samples) as file,
    ):
        buffer: list[pa.Table] = []
        with progress_bar("summing documents", file.metadata.num_rows, "samples") as bar:
            for domain, pieces in groupby(read_pieces(file), key=lambda piece: piece[0]):
                sums = DocumentSums(by_name[domain], block_size)
                for _, blocks, values in pieces:
                    buffer.append(sums.add(blocks, values))
                    bar.update(len(blocks))
                    if sum(map(len, buffer)) >= ROW_GROUP:
                        writer.write_table(pa.concat_tables(buffer))
                        buffer.clear()
                buffer.append(sums.rest())
        writer.write_table(pa.concat_tables(buffer))


Piece = tuple[str, npt.NDArray[np.int64], npt.NDArray[np.float64]]  # domain, blocks, values (NaN: none)


def read_pieces(file: pq.ParquetFile) -> Iterator[Piece]:
    """Yield the samples of a file in pieces of one domain."""
    for batch in file.iter_batches(BATCH, columns=["domain", "block", "value"]):
        codes = batch["domain"].dictionary_encode()
        names, numbers = codes.dictionary.to_pylist(), codes.indices.to_numpy()
        blocks, values = batch["block"].to_numpy(), batch["value"].to_numpy(zero_copy_only=False)
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(cuts):
            yield names[numbers[start]], blocks[start:end], values[start:end]


class DocumentSums:
    """Sum the values of one shard's documents.

    Samples come in the order of their blocks, so a document is complete as soon as the next one begins.
    """

    def __init__(self, shard: Shard, block_size: int) -> None:
        self._shard, self._block_size = shard, block_size
        # The document that may continue in the next samples.
        self._open: dict[str, npt.NDArray[Any]] = {
            "document": np.empty(0, np.int64),
            "value": np.empty(0),
            "valued": np.empty(0, np.int64),  # number of its blocks with a value
            "blocks": np.empty(0, np.int64),
        }

    def add(self, blocks: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> pa.Table:
        """Add the next samples and return the documents that are complete.

        Args:
            blocks: (n,)
            values: (n,) NaN for none.
        """
        rows, documents, parts = divide_blocks(self._shard, self._block_size, blocks)
        has_value = ~np.isnan(values[rows])
        new = {
            "document": documents,
            "value": np.where(has_value, values[rows], 0) * parts,
            "valued": has_value.astype(np.int64),
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


def divide_blocks(
    shard: Shard, block_size: int, blocks: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return all pairs of a block and a document that has some of its targets.

    Args:
        blocks: (n,)

    Returns:
        (pairs,) each, in the order of `blocks`: the index in `blocks`, the document, and the document's share
        of the block's targets.
    """
    begin = blocks * block_size + 1
    end = begin + block_size
    first = np.searchsorted(shard.document_starts, begin, "right") - 1
    last = np.searchsorted(shard.document_starts, end - 1, "right") - 1
    counts = last - first + 1
    rows = np.repeat(np.arange(len(blocks)), counts)
    documents = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts - first, counts)
    starts, ends = locate_documents(shard, documents)
    return rows, documents, (np.minimum(ends, end[rows]) - np.maximum(starts, begin[rows])) / block_size
