"""Test whether low values detect noisy samples, and whether training improves without them.

    PILE_SAMPLE_DIR=... python -m benchmarks.noise --work_dir /tmp/noise

Shuffle the tokens of 16 % of the training blocks and train GPT2-Tiny on all blocks. The AUROC shows how well
values detect the shuffled ones. Then drop the 16 % of lowest value (attribution.curate) and train again for
as many steps; for comparison, train without the shuffled blocks. Seeds draw the noise, the initial weights
and the order.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.curate.command import curate
from attribution.database import Normalise
from attribution.scored_run import ScoredRun
from benchmarks.experiment import (
    compute_auroc,
    compute_sample_values,
    cut_head,
    experiment_parser,
    link_splits,
    make_sample_shards,
    read_last_losses,
    run_side_by_side,
    train,
    write_split,
    write_without_blocks,
)
from data_processing.shards import GPT2_IDS, list_shards

NOISE = 0.16
CHOSEN: Normalise = "absolute"  # each sample is used once, and in plain sums early steps count more
NORMALISATIONS: tuple[Normalise, ...] = ("none", CHOSEN)
BLOCK, BATCH, ROWS = 64, 8, 8


def write_noisy_data(source: Path, folder: Path, seed: int, blocks: int) -> pd.DataFrame:
    """Write the beginning of each domain, about `blocks` blocks in all, with some blocks shuffled.

    Returns:
        domain, block, noisy: which blocks are shuffled.
    """
    shards = list_shards(source, "train")
    total = sum(shard.num_tokens for shard in shards)
    random, records, tokens = np.random.default_rng(seed), [], {}
    for shard in shards:
        share = blocks * BLOCK * shard.num_tokens // total
        tokens[shard.domain] = cut_head(shard, max(share, BLOCK + 2))
        for block in range((len(tokens[shard.domain]) - 1) // BLOCK):
            noisy = bool(random.random() < NOISE)
            records.append({"domain": shard.domain, "block": block, "noisy": noisy})
            if noisy:  # END_OF_TEXTs stay in place
                part = tokens[shard.domain][block * BLOCK : (block + 1) * BLOCK]
                words = part != GPT2_IDS.end_of_text
                part[words] = random.permutation(part[words])
    if not folder.exists():
        write_split(folder, "train", tokens)
        link_splits(source, folder, ("val", "test"))
    return pd.DataFrame(records)


def run_one_seed(work_dir: Path, max_steps: int, seed: int) -> dict[str, float]:
    """Return the AUROCs and the val losses after each training, by name."""
    noisy = work_dir / f"noisy-{seed}"
    blocks = write_noisy_data(work_dir / "shards", noisy, seed, max_steps * BATCH)
    flags: dict[str, Any] = {
        "block_size": BLOCK, "batch_size": BATCH, "max_steps": max_steps, "eval_interval": max_steps,
        "learning_rate": 1e-3, "seed": seed,
    }  # fmt: skip
    scored = train(work_dir, f"all-{seed}", pile_data_dir=noisy, val_batch_size=ROWS, **flags)
    run, found = ScoredRun.open(scored), {"everything": read_last_losses(scored)["val"]}
    for normalise in NORMALISATIONS:
        values = compute_sample_values(run, normalise=normalise).merge(blocks, on=["domain", "block"])
        low, high = (values.value[values.noisy == noisy].to_numpy() for noisy in (True, False))
        found[f"AUROC, {normalise}"] = compute_auroc(low, high)
    curated = work_dir / f"curated-{seed}"
    if not curated.exists():
        curate([run], curated, drop=f"bottom:{NOISE}", normalise=CHOSEN)
    left_out = pd.read_parquet(curated / "dropped.parquet").astype({"domain": str})
    found["noise among what is left out"] = left_out.merge(blocks, on=["domain", "block"]).noisy.mean()
    clean = work_dir / f"clean-{seed}"
    if not clean.exists():
        shuffled = blocks[blocks.noisy].groupby("domain")["block"].agg(list).to_dict()
        write_without_blocks(noisy, clean, BLOCK, shuffled)
    folders = {"without the lowest": curated, "without the noise": clean}
    for name, folder in folders.items():
        again = train(work_dir, f"{name}-{seed}", pile_data_dir=folder, method="Regular", **flags)
        found[name] = read_last_losses(again)["val"]
    return found


def main(argv: list[str]) -> None:
    args = experiment_parser("benchmarks.noise", __doc__.split("\n")[0]).parse_args(argv)
    make_sample_shards(args.work_dir / "shards")
    calls = [partial(run_one_seed, args.work_dir, args.max_steps, seed) for seed in range(args.seeds)]
    found = pd.DataFrame(run_side_by_side(args.jobs, calls)).rename_axis("seed")
    print(found.T.assign(mean=found.mean()).round(4))


if __name__ == "__main__":
    main(sys.argv[1:])
