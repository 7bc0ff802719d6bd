"""Measure what scores cost in Hugging Face's Trainer: step times as a ratio in one interleaved run.

    python -m benchmarks.trainer_price --batch_size 8 --val_batch_size 2

Each round trains a few steps with the plain Trainer on n+m rows, with the plain one on n rows and with the scored one
on n train and m validation rows, in a random order, from the same random Llama. Times are of single updates, from the
first micro-batch to the end of the optimizer's step. Audits are left out; benchmarks.value_price has their price.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.step_time import bootstrap_interval
from examples.instructions import tokenizer
from foundation.progress import progress_bar
from ghostEngines import Scoring
from ghostEngines.integrations.transformers import scored

STEPS = 6  # in a round, the first two of which warm up
KINDS = ("plain_nm", "plain_n", "scored")


class Clock(TrainerCallback):
    """Records the seconds of each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def rows(count: int, args: argparse.Namespace, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(args.vocabulary, (count, args.block_size), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def seconds_of(kind: str, args: argparse.Namespace, folder: Path) -> float:
    """Return the median seconds of an update of one kind of training."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 64,
            max_position_embeddings=args.block_size,
        )
    )
    n = args.batch_size + (args.val_batch_size if kind == "plain_nm" else 0)
    options = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=n,
        max_steps=STEPS,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    own: dict[str, Any] = {"model": model, "args": options, "train_dataset": rows(n * STEPS, args, seed=0)}
    if kind == "scored":
        own |= {
            "processing_class": tokenizer(),
            "score_against": rows(args.val_batch_size, args, seed=1),
            "scores": folder / "run",
            "scoring": Scoring(audit_interval=0),
        }
    trainer, clock = (scored(Trainer) if kind == "scored" else Trainer)(**own), Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return statistics.median(clock.seconds[2:])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.trainer_price", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=8, help="n, train rows")
    parser.add_argument("--val_batch_size", type=int, default=2, help="m, validation rows")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    order = random.Random(0)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with progress_bar("timing", args.rounds, "round") as bar:
        for _ in range(args.rounds):
            for kind in order.sample(KINDS, len(KINDS)):
                with tempfile.TemporaryDirectory() as folder:
                    found[kind].append(seconds_of(kind, args, Path(folder)))
            bar.update()
    table = Table("price", "median", "95 % interval")
    for kind in ("plain_nm", "plain_n"):
        ratios = [mine / other for mine, other in zip(found["scored"], found[kind], strict=True)]
        low, high = bootstrap_interval(ratios)
        table.add_row(f"scored / {kind}", f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
