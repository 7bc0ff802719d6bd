"""The rows that the dot products refer to: a fixed, seeded batch of the validation split, kept beside the
scores."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_processing.blocks import Batch
from data_processing.tokenizers import Tokenizer
from foundation.errors import file_errors


def tokens_of(batch: Batch) -> torch.Tensor:
    """Return the tokens of each row with its last target (m, T+1)."""
    return torch.cat([batch.x, batch.y[:, -1:]], dim=1)


def hash_of_rows(batch: Batch) -> str:
    """Return the SHA-256 of the tokens. The scores carry it: another hash means other validation rows."""
    return hashlib.sha256(tokens_of(batch).numpy().astype("<u2").tobytes()).hexdigest()


def save_validation_rows(batch: Batch, tokenizer: Tokenizer, path: Path) -> None:
    """Write rows.parquet, one row each with sample_id, domain, block, its T+1 tokens and their
    text."""
    tokens = tokens_of(batch)
    table = pa.table(
        {
            "sample_id": pa.array(batch.sample_ids),
            "domain": list(batch.domains),
            "block": pa.array(batch.blocks),
            "tokens": pa.array(tokens.tolist(), pa.list_(pa.uint16())),
            "text": [tokenizer.decode(row) for row in tokens.tolist()],
        }
    )
    with file_errors(path.parent):
        path.parent.mkdir()
        pq.write_table(table, path)
