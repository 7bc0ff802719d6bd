"""The rows that the dot products refer to: a fixed, seeded batch of the validation split, kept beside the
scores."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_processing.blocks import Batch
from foundation.errors import file_errors
from score_store.samples import Sample


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
    write_rows(path, batch.sample_ids, batch.domains, batch.blocks, tokens_of(batch).tolist(), shown)


def hash_of_samples(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 of validation rows of a loop of one's own."""
    return hashlib.sha256(json.dumps([row.columns for row in samples]).encode()).hexdigest()


def save_validation_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write rows.parquet of a loop of one's own."""
    ids = [row.sample_id for row in samples]
    tokens = [row.columns["tokens"] for row in samples]
    write_rows(path, ids, [row.group for row in samples], ids, tokens, [Shown(row.text) for row in samples])


def write_rows(
    path: Path,
    sample_ids: npt.ArrayLike,
    domains: Sequence[str],
    blocks: npt.ArrayLike,
    tokens: Sequence[Sequence[int]],
    shown: Sequence[Shown],
) -> None:
    """Write rows.parquet, in a new folder. All arguments are of the m rows. Raises UserError if it cannot be
    written."""
    most = max((max(row, default=0) for row in tokens), default=0)
    columns = {
        "sample_id": pa.array(np.asarray(sample_ids, np.int64)),
        "domain": list(domains),
        "block": pa.array(np.asarray(blocks, np.int64)),
        "tokens": pa.array(tokens, pa.list_(pa.uint16() if most < 1 << 16 else pa.uint32())),
        "text": [row.text for row in shown],
    }
    if any(row.image is not None for row in shown):
        columns["image"] = pa.array([row.image for row in shown], pa.binary())
    with file_errors(path.parent):
        path.parent.mkdir()
        pq.write_table(pa.table(columns), path)
