"""What the score files cost a step: appending its rows, a flush every few steps, the merge at the end.

    python -m benchmarks.score_writing --steps 1000 --batch_size 8

Float32 scores of random rows, in a temporary folder (TMPDIR: on the disk that results would be on). Each
flush waits for the disk. Prints the time per step, and its share of a step of --step_seconds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from score_store.writer import ScoreWriter, open_scores

DOMAINS = tuple(f"Domain {number:02d}" for number in range(22))


def append(writer: ScoreWriter, step: int, n: int, random: np.random.Generator) -> float:
    """Appends n rows of a step. Returns the seconds that took."""
    numbers = random.integers(0, len(DOMAINS), n)
    blocks = random.integers(0, 10_000_000, n)
    rows = {
        "sample_ids": numbers << 40 | blocks,
        "domains": tuple(DOMAINS[number] for number in numbers),
        "blocks": blocks,
        "dot_products": torch.randn(n),
        "train_losses": torch.rand(n),
        "val_loss": torch.rand(()),
        "clip_factor": torch.rand(()),
        "null": torch.tensor(False),
    }
    start = time.perf_counter()
    writer.append(step=step, lr=1e-4, global_batch_size=n, **rows)
    return time.perf_counter() - start


def timed_flush(writer: ScoreWriter) -> float:
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
            appends.append(append(writer, step, args.batch_size, random))
            if (step + 1) % args.save_interval == 0:
                flushes.append(timed_flush(writer))
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
