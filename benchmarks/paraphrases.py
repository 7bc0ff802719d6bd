"""Test whether edited copies of the validation rows rank above all other training samples.

    PILE_SAMPLE_DIR=... python -m benchmarks.paraphrases --work_dir /tmp/paraphrases

Add lightly and heavily edited copies of the validation rows to the training data, as documents of one block
each. Train GPT2-Tiny for two epochs with pairwise scores, and rank all samples by their values in the second
epoch: once by the value for all validation rows together, once by the value for the copied row alone.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.database import ScoreDatabase
from attribution.scored_run import ScoredRun
from benchmarks.experiment import (
    cut_head,
    experiment_parser,
    link_splits,
    make_sample_shards,
    run_side_by_side,
    train,
    write_split,
)
from data_processing.blocks import BlockDataset
from data_processing.domain_lists import parse_set
from data_processing.shards import GPT2_IDS, Tokens, list_shards
from data_processing.tokenizers import Tokenizer, get_tokenizer
from dataloader import validation_batch

BLOCK, BATCH, ROWS = 64, 8, 8
EDITS = {"light": 0.1, "heavy": 0.4}  # share of the words that are dropped or swapped
DOMAIN = "Edited copies"


def edit_text(text: str, share: float, random: np.random.Generator) -> str:
    """Edit a share of the words: drop half of them, and swap half with the next word."""
    words, kept = text.split(" "), []
    while words:
        word, draw = words.pop(0), random.random()
        if draw < share / 2:
            continue
        if draw < share and words:
            word, words[0] = words[0], word
        kept.append(word)
    return " ".join(kept)


def make_document(tokens: Tokens, share: float, random: np.random.Generator, tokenizer: Tokenizer) -> Tokens:
    """Return an edited copy with its END_OF_TEXT, (BLOCK,). A short copy is repeated up to that length."""
    text = tokenizer.decode([token for token in tokens.tolist() if token != GPT2_IDS.end_of_text])
    copy = np.resize(tokenizer.encode(edit_text(text, share, random)), BLOCK - 1)
    return np.append(copy, np.uint16(GPT2_IDS.end_of_text))


def write_data_with_copies(source: Path, folder: Path, seed: int, blocks: int) -> list[tuple[str, int]]:
    """Write about `blocks` blocks of the sample data, and the copies as another domain.

    Returns:
        (level of editing, validation row) of each block of that domain.
    """
    val = BlockDataset.open(source, BLOCK, parse_set("--val_set", "val"))
    batch = validation_batch(val, ROWS, seed)
    random, tokenizer = np.random.default_rng(seed), get_tokenizer("gpt2")
    places, copies = [], []
    for level, share in EDITS.items():
        for row in range(ROWS):
            tokens = val.tokens(batch.domains[row], int(batch.blocks[row]))
            copies.append(make_document(tokens, share, random, tokenizer))
            places.append((level, row))
    if not folder.exists():
        shards = list_shards(source, "train")
        total = sum(shard.num_tokens for shard in shards)
        parts = {
            shard.domain: cut_head(shard, max(blocks * BLOCK * shard.num_tokens // total, BLOCK + 2))
            for shard in shards
        }
        filler = copies[-1]  # a token must follow the last block: it is the block's last target
        write_split(folder, "train", parts | {DOMAIN: np.concatenate([*copies, filler])})
        link_splits(source, folder, ("val", "test"))
    return places


def run_one_seed(work_dir: Path, max_steps: int, seed: int) -> pd.DataFrame:
    """Return one row per copy: edits, rank, rank for its own row, samples."""
    folder, epoch = work_dir / f"copies-{seed}", max_steps // 2
    places = write_data_with_copies(work_dir / "shards", folder, seed, epoch * BATCH)
    run = train(
        work_dir, f"copies-{seed}", pile_data_dir=folder, block_size=BLOCK, batch_size=BATCH, seed=seed,
        val_batch_size=ROWS, score_granularity="pairwise", max_steps=max_steps, eval_interval=max_steps,
        learning_rate=1e-3,
    )  # fmt: skip
    with ScoreDatabase([ScoredRun.open(run)], steps=(epoch, None), normalise="absolute") as database:
        rows = ", ".join(
            f"sum(weight * lr * clip_factor * row_weight * pairwise[{row + 1}]) AS row{row}"
            for row in range(ROWS)
        )
        samples = database.query(
            f"""SELECT domain, block, sum(weighted_value) AS value, {rows}
            FROM scores JOIN (SELECT run, step, weight FROM steps) USING (run, step) GROUP BY ALL""",
            "summing samples",
        ).to_pandas()
    ranks = samples.rank(ascending=False, numeric_only=True)
    copies = samples.index[samples.domain.astype(str) == DOMAIN]
    found = [
        {
            "seed": seed,
            "edits": places[samples.block[index]][0],
            "rank": ranks.value[index],
            "rank for its own row": ranks[f"row{places[samples.block[index]][1]}"][index],
            "samples": len(samples),
        }
        for index in copies
        if samples.block[index] < len(places)
    ]
    return pd.DataFrame(found)


def main(argv: list[str]) -> None:
    args = experiment_parser("benchmarks.paraphrases", __doc__.split("\n")[0]).parse_args(argv)
    make_sample_shards(args.work_dir / "shards")
    calls = [partial(run_one_seed, args.work_dir, args.max_steps, seed) for seed in range(args.seeds)]
    found = pd.concat(run_side_by_side(args.jobs, calls))
    measures = {
        "rank": ["mean", "median"],
        "rank for its own row": ["mean", "median"],
        "samples": ["mean", "count"],
    }
    for by in (["edits", "seed"], ["edits"]):
        print(found.groupby(by).agg(measures), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
