"""Measure what score files cost per step: appending rows, flushing every few steps, merging at the end.

    python -m benchmarks.score_writing --steps 1000 --batch_size 8

Write float32 scores of random rows to a temporary folder. Set TMPDIR to the disk of the results, because each
flush waits for the disk. Print the time per step, and its share of a step of --step_seconds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from score_store.writer import ScoredStep, ScoreWriter, open_scores

DOMAINS = tuple(f"Domain {number:02d}" for number in range(22))


def time_append(writer: ScoreWriter, step: int, n: int, random: np.random.Generator) -> float:
    """Append n rows of a step. Return the seconds it took."""
    numbers = random.integers(0, len(DOMAINS), n)
    blocks = random.integers(0, 10_000_000, n)
    domains = tuple(DOMAINS[number] for number in numbers)
    dot_products, train_losses = torch.randn(n), torch.rand(n)
    val_loss, clip_factor, null = torch.rand(()), torch.rand(()), torch.tensor(False)
    start = time.perf_counter()
    writer.append(
        ScoredStep(step, lr=1e-4, clip_factor=clip_factor, val_loss=val_loss, global_batch_size=n, null=null),
        sample_ids=numbers << 40 | blocks,
        domains=domains,
        blocks=blocks,
        dot_products=dot_products,
        train_losses=train_losses,
    )
    return time.perf_counter() - start


def time_flush(writer: ScoreWriter) -> float:
    """Flush. Return the seconds it took."""
    start = time.perf_counter()
    writer.flush()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.score_writing", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--save_interval", type=int, default=10)
    parser.add_argument(
        "--step_seconds", type=float, default=10.0, help="of a training step, to compare with"
    )
    args = parser.parse_args(argv)
    random = np.random.default_rng(0)
    appends, flushes = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = ScoreWriter(Path(folder) / "scores", rank=0, metadata={})
        for step in range(args.steps):
            appends.append(time_append(writer, step, args.batch_size, random))
            if (step + 1) % args.save_interval == 0:
                flushes.append(time_flush(writer))
        start = time.perf_counter()
        writer.close()
        merge = time.perf_counter() - start
        assert open_scores(Path(folder) / "scores").count_rows() == args.steps * args.batch_size
    seconds = (sum(appends) + sum(flushes) + merge) / args.steps
    print(
        f"{args.batch_size} rows a step, a flush every {args.save_interval}, {args.steps} steps: append "
        f"{1e3 * np.median(appends):.3f} ms, flush {1e3 * np.median(flushes):.2f} ms (longest "
        f"{1e3 * max(flushes):.1f}), merge of {len(flushes)} files {1e3 * merge:.0f} ms; all together "
        f"{1e3 * seconds:.3f} ms a step, {seconds / args.step_seconds:.4%} of a step of "
        f"{args.step_seconds:g} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
