"""The rows that the dot products refer to: a fixed, seeded batch of the validation split, kept beside the
scores."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_processing.blocks import Batch
from foundation.errors import file_errors


@dataclass(frozen=True)
class Shown:
    """What is shown of a row. image: a small PNG; None where rows have no image."""

    text: str
    image: bytes | None = None


def tokens_of(batch: Batch) -> torch.Tensor:
    """Return the tokens of each row with its last target (m, T+1); of rows with an image, which end in padding, the
    tokens alone (m, T)."""
    if batch.images is not None:
        return batch.x
    return torch.cat([batch.x, batch.y[:, -1:]], dim=1)


def hash_of_rows(batch: Batch) -> str:
    """Return the SHA-256 of the rows. The scores carry it: another hash means other validation rows."""
    if batch.images is not None:
        parts = [part.contiguous().numpy().tobytes() for part in batch.inputs]
        return hashlib.sha256(b"".join(parts)).hexdigest()
    tokens = tokens_of(batch).numpy()
    return hashlib.sha256(tokens.astype("<u2" if tokens.max() < 1 << 16 else "<u4").tobytes()).hexdigest()


def save_validation_rows(batch: Batch, shown: Sequence[Shown], path: Path) -> None:
    """Write rows.parquet, one row each with sample_id, domain, block, its tokens, their text, and a small copy of its
    image where rows have one."""
    tokens = tokens_of(batch)
    kind = pa.uint16() if tokens.max() < 1 << 16 else pa.uint32()
    columns = {
        "sample_id": pa.array(batch.sample_ids),
        "domain": list(batch.domains),
        "block": pa.array(batch.blocks),
        "tokens": pa.array(tokens.tolist(), pa.list_(kind)),
        "text": [row.text for row in shown],
    }
    if batch.images is not None:
        columns["image"] = pa.array([row.image for row in shown], pa.binary())
    table = pa.table(columns)
    with file_errors(path.parent):
        path.parent.mkdir()
        pq.write_table(table, path)
