"""Are harmful samples the noisy ones, and does it help to leave them out?

    PILE_SAMPLE_DIR=... python -m benchmarks.noise --work_dir /tmp/noise

In 16 % of the training blocks the tokens are put in random order. GPT2-Tiny is trained on all of it; the
AUROC says how well a sample's value tells the noise. Then the 16 % of lowest value are left out
(attribution.curate), and the model is trained again, for as many steps, on what is left; for comparison, on
the data without the noise itself. Seeds draw the noise, the initial weights and the order."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.curate.command import curate
from attribution.scored_run import ScoredRun
from benchmarks.experiment import (
    auroc,
    experiment_parser,
    head_of,
    last_losses,
    link_splits,
    sample_shards,
    sample_values,
    side_by_side,
    train,
    without_blocks,
    write_split,
)
from data_processing.shards import EOT, list_shards

NOISE = 0.16
CHOSEN = "absolute"  # each sample is used once, and early steps count for more in a plain sum
BLOCK, BATCH, ROWS = 64, 8, 8


def noisy_data(source: Path, folder: Path, seed: int, blocks: int) -> pd.DataFrame:
    """Writes the first documents of each domain, about `blocks` blocks in all, some of them shuffled. Which:
    domain, block, noisy."""
    shards = list_shards(source, "train")
    total = sum(shard.num_tokens for shard in shards)
    random, records, tokens = np.random.default_rng(seed), [], {}
    for shard in shards:
        share = blocks * BLOCK * shard.num_tokens // total
        tokens[shard.domain] = head_of(shard, max(share, BLOCK + 2))
        for block in range((len(tokens[shard.domain]) - 1) // BLOCK):
            noisy = bool(random.random() < NOISE)
            records.append({"domain": shard.domain, "block": block, "noisy": noisy})
            if noisy:  # documents end where they ended
                part = tokens[shard.domain][block * BLOCK : (block + 1) * BLOCK]
                words = part != EOT
                part[words] = random.permutation(part[words])
    if not folder.exists():
        write_split(folder, "train", tokens)
        link_splits(source, folder, ("val", "test"))
    return pd.DataFrame(records)


def one_seed(work_dir: Path, max_steps: int, seed: int) -> dict[str, float]:
    """The AUROCs, and the losses on val after each training, by name."""
    noisy = work_dir / f"noisy-{seed}"
    blocks = noisy_data(work_dir / "shards", noisy, seed, max_steps * BATCH)
    flags = {
        "block_size": BLOCK, "batch_size": BATCH, "max_steps": max_steps, "eval_interval": max_steps,
        "learning_rate": 1e-3, "seed": seed,
    }  # fmt: skip
    scored = train(work_dir, f"all-{seed}", pile_data_dir=noisy, val_batch_size=ROWS, **flags)
    run, found = ScoredRun.open(scored), {"everything": last_losses(scored)["val"]}
    for normalise in ("none", CHOSEN):
        values = sample_values(run, normalise=normalise).merge(blocks, on=["domain", "block"])
        low, high = (values.value[values.noisy == noisy].to_numpy() for noisy in (True, False))
        found[f"AUROC, {normalise}"] = auroc(low, high)
    curated = work_dir / f"curated-{seed}"
    if not curated.exists():
        curate([run], curated, drop=f"bottom:{NOISE}", normalise=CHOSEN)
    left_out = pd.read_parquet(curated / "dropped.parquet").astype({"domain": str})
    found["noise among what is left out"] = left_out.merge(blocks, on=["domain", "block"]).noisy.mean()
    clean = work_dir / f"clean-{seed}"
    if not clean.exists():
        shuffled = blocks[blocks.noisy].groupby("domain")["block"].agg(list).to_dict()
        without_blocks(noisy, clean, BLOCK, shuffled)
    folders = {"without the lowest": curated, "without the noise": clean}
    for name, folder in folders.items():
        again = train(work_dir, f"{name}-{seed}", pile_data_dir=folder, method="Regular", **flags)
        found[name] = last_losses(again)["val"]
    return found


def main(argv: list[str]) -> None:
    args = experiment_parser("benchmarks.noise", __doc__.split("\n")[0]).parse_args(argv)
    sample_shards(args.work_dir / "shards")
    calls = [partial(one_seed, args.work_dir, args.max_steps, seed) for seed in range(args.seeds)]
    found = pd.DataFrame(side_by_side(args.jobs, calls)).rename_axis("seed")
    print(found.T.assign(mean=found.mean()).round(4))


if __name__ == "__main__":
    main(sys.argv[1:])
