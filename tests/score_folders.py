"""Folders as runs with scores leave them, made without training: what the tests of `attribution` read."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_processing.blocks import BlockDataset
from data_processing.domain_lists import parse_set
from foundation.granularity import Granularity
from score_store.schema import ValueKind
from score_store.writer import ExactRows, ScoredStep, ScoreWriter

T = 8  # block size


def write_run(
    folder: Path,
    data: Path,
    *,
    steps: int = 12,
    seed: int = 0,
    ranks: int = 2,
    null_steps: Collection[int] = (),
    zero_steps: Collection[int] = (),
    granularity: Granularity = "total",
    split: str = "train",
    direction: str = "gradient",
    audited: Collection[int] = (),
    values: ValueKind = "in_pass",
    by_target: bool = False,
    flush_every: int = 2,
) -> Path:
    """Steps of 3 random samples for each rank, with random scores. null_steps: that the optimizer skipped;
    zero_steps: with learning rate 0; audited: with exact values, which agree with the others somewhat."""
    folder.mkdir(parents=True)
    config = {
        "method": "GradDotProd",
        "run_name": folder.name,
        "resolved_from": {},
        "pile_data_dir": str(data),
    }
    (folder / "config.json").write_text(json.dumps(config))
    blocks = BlockDataset.open(data, T, parse_set("--train_set", split))
    metadata = {
        "run_configuration": json.dumps({"seed": seed, "direction": direction, "optimizer": "AdamW"}),
        "validation_sha256": "0", "block_size": str(T),
        "split": split, "shard_sha256": json.dumps(blocks.checksums), "layers": "[]",
        "domains": json.dumps(blocks.all_domains),
    }  # fmt: skip
    random = np.random.default_rng(seed)
    val_losses = random.random(steps)
    for rank in range(ranks):
        writer = ScoreWriter(
            folder / "grad_dotprods",
            rank=rank,
            metadata=metadata,
            granularity=granularity,
            values=values,
            by_target=by_target,
            rows_per_file=1,
        )
        for step in range(steps):
            domains = random.choice(blocks.domains, 3).tolist()
            places = [int(random.integers(blocks.blocks_per_domain[domain])) for domain in domains]
            scores = random.standard_normal((3, T if granularity == "token" else 2))
            lr = 0.0 if step in zero_steps else 0.1 / (1 + step)
            exact = None
            if step in audited:
                own = torch.tensor(lr * 0.5 * scores.sum(1) / (3 * ranks))
                noise = torch.tensor(random.standard_normal(3)) * 0.2 * lr
                both = 2 * own + noise + 1
                if step > 60 and values == "in_pass":  # a later audit leaves rows out
                    both[2] = torch.nan
                parts = None
                if by_target:
                    parts = torch.tensor(random.standard_normal((3, T)))
                    both = parts.sum(1)
                fall = float(val_losses[step])
                exact = ExactRows(both, 0.2 + 0.1 * fall, 0.3, 0.1, fall, 0.9, by_target=parts)
            writer.append(
                ScoredStep(
                    step,
                    lr=lr,
                    clip_factor=0.5,
                    val_loss=val_losses[step],
                    global_batch_size=3 * ranks,
                    null=step in null_steps,
                ),
                sample_ids=[blocks.sample_id(*place) for place in zip(domains, places, strict=True)],
                domains=domains,
                blocks=places,
                dot_products=torch.tensor(scores if granularity != "total" else scores.sum(1)),
                train_losses=torch.tensor(random.random(3)),
                exact=exact,
            )
            if (step + 1) % flush_every == 0:
                writer.flush()
        writer.close()
    return folder


def scores_of(folder: Path) -> pd.DataFrame:
    """All rows, as a user reads them."""
    return pd.read_parquet(folder / "grad_dotprods").astype({"domain": str})
