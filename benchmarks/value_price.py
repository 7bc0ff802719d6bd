"""Measure what each kind of value costs, as ratios of step times in one interleaved run.

    python -m benchmarks.value_price --block_size 1024 --batch_size 2 --val_batch_size 1

The parts are timed one by one, each once a round in a random order, on the same weights and rows; the prices are
sums of parts, as the training loop makes them. A training step includes fused AdamW with learning rate 0.

regular_n      a training step on the n train rows, --method Regular
regular_nm     the same on n+m rows
gradient       --direction gradient: a training step, with the dot products
in_pass        --direction auto: the same, weighed by AdamW
given          a training step on the n train rows, scored against a validation gradient that is there
current        a pass over the m validation rows that makes one
lookahead      the same at the look-ahead point
exact          the exact values of a step: what --values exact adds
by_target      the same with their parts by target: --exact_by_target
token          in_pass with a score for each position: --score_granularity token
audit          what an audit adds: those of at most AUDITED_ROWS rows

--memory measures the peak memory of steps without and with exact values, each in a process of its own.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.step_methods import Setup, trained
from benchmarks.step_time import bootstrap_interval
from foundation.paths import path_argument
from foundation.progress import progress_bar
from ghostEngines import GradDotProdEngine
from ghostEngines.scoring import AUDITED_ROWS
from models.architectures import ARCHITECTURES

INTERVALS = (1, 2, 4, 8, 16)  # K
PARTS = (
    "regular_n", "regular_nm", "gradient", "in_pass", "token", "given", "current", "lookahead", "exact", "by_target",
    "audit",
)  # fmt: skip
Seconds = dict[str, list[float]]


class Parts:
    """The parts, on one model with one optimizer. Each call returns what is timed after what is not."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.dtype, args.compile, args.activation_checkpointing = "float32", False, False
        self.setup = setup = Setup.make(args)
        del setup.hf
        self.model = setup.own_model("graddotprod")
        self.optimizer = torch.optim.AdamW(trained(self.model), lr=0.0, fused=True)
        self.train, self.validation = slice(0, setup.n), slice(setup.n, None)
        self.engines = {
            name: GradDotProdEngine(
                self.model,
                setup.m,
                direction="gradient" if name == "gradient" else "auto",
                granularity="token" if name == "token" else "total",
            )
            for name in ("gradient", "in_pass", "token", "given", "exact")
        }
        self.step(self.regular, slice(None))  # from here on AdamW has its moments
        engine = self.engines["given"]
        engine.attach(self.optimizer)
        self.direction, _ = engine.validation_gradient(lambda: self.losses(self.validation))
        engine.detach()

    def losses(self, rows: slice) -> Any:
        return self.model(*self.setup.inputs(rows))

    def regular(self, rows: slice) -> None:
        self.losses(rows).mean().backward()

    def step(self, backward: Callable[[slice], None], rows: slice) -> None:
        backward(rows)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, name: str) -> float:
        """Return the seconds of one part."""
        if name.startswith("regular"):
            rows = self.train if name == "regular_n" else slice(None)
            return timed(lambda: self.step(self.regular, rows))
        engine = self.engines.get(name, self.engines["exact"])
        engine.attach(self.optimizer)
        if name == "given":
            engine.use_direction(self.direction)

        def scored(rows: slice) -> None:
            engine.joint_loss(self.losses(rows)).backward()
            engine.prepare_gradients()
            engine.dot_products()

        if name in ("gradient", "in_pass", "token", "given"):
            rows = self.train if name == "given" else slice(None)
            seconds = timed(lambda: self.step(scored, rows))
        elif name in ("exact", "by_target", "audit"):
            scored(slice(None))
            rows = slice(min(self.setup.n, AUDITED_ROWS)) if name == "audit" else self.train
            seconds = timed(lambda: self.exact(rows, by_target=name == "by_target"))
            self.optimizer.zero_grad()
        else:
            seconds = timed(
                lambda: engine.validation_gradient(
                    lambda: self.losses(self.validation), lookahead=name == "lookahead"
                )
            )
        engine.detach()
        return seconds

    def exact(self, rows: slice, by_target: bool) -> None:
        self.engines["exact"].exact_values(
            [lambda: self.losses(rows)],
            lambda: self.losses(self.validation),
            clip_factor=0.5,
            global_rows=self.setup.n,
            whole_batch=False,  # nothing was clipped, so that the sum would be wrong
            by_target=by_target,
        )


def timed(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def prices(seconds: Seconds) -> dict[str, list[float]]:
    """Return each price in each round."""
    rounds = [dict(zip(seconds, each, strict=True)) for each in zip(*seconds.values(), strict=True)]
    found = {
        "in_pass / gradient": [each["in_pass"] / each["gradient"] for each in rounds],
        "in_pass / Regular on n+m": [each["in_pass"] / each["regular_nm"] for each in rounds],
        "in_pass / Regular on n": [each["in_pass"] / each["regular_n"] for each in rounds],
    }
    for point in ("current", "lookahead"):
        for interval in INTERVALS:
            found[f"{point}, K={interval} / Regular on n"] = [
                (each["given"] + each[point] / interval) / each["regular_n"] for each in rounds
            ]
    found["by position / in_pass"] = [each["token"] / each["in_pass"] for each in rounds]
    found["by target / exact, in every step"] = [
        (each["in_pass"] + each["by_target"]) / (each["in_pass"] + each["exact"]) for each in rounds
    ]
    found["exact in every step / in_pass"] = [1 + each["exact"] / each["in_pass"] for each in rounds]
    found["audit of every 100th step / in_pass"] = [
        1 + each["audit"] / each["in_pass"] / 100 for each in rounds
    ]
    return found


def peak(argv: list[str], what: str) -> float:
    """Return the peak memory of steps in a new process, in bytes."""
    command = [sys.executable, "-m", "benchmarks.value_price", *argv, "--peak_of", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(args: argparse.Namespace) -> float:
    parts = Parts(args)
    for _ in range(2):
        parts.time("in_pass")
        if args.peak_of == "exact":
            parts.time("exact")
    if args.device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.value_price", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="GPT2-Small")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=2, help="n, train rows")
    parser.add_argument("--val_batch_size", type=int, default=1, help="m, validation rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--output", type=path_argument, help="also write the figures as JSON")
    parser.add_argument("--peak_of", choices=("in_pass", "exact"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak_of:
        print(measure_peak(args))
        return
    console, report = Console(highlight=False), {}
    if args.memory:
        without, including = (peak(argv, what) for what in ("in_pass", "exact"))
        size = sum(4 * p.numel() for p in Parts(args).model.parameters())
        report["memory"] = {"in_pass": without, "exact": including, "model": size}
        console.print(
            f"peak memory {without / 1e9:.2f} GB, with exact values {including / 1e9:.2f} GB: "
            f"{(including - without) / size:+.2f} of the model's size"
        )
    parts, order = Parts(args), random.Random(0)
    seconds: Seconds = {name: [] for name in PARTS}
    with progress_bar("timing", args.rounds + 1, "round") as bar:
        for number in range(args.rounds + 1):
            for name in order.sample(PARTS, len(PARTS)):
                elapsed = parts.time(name)
                if number > 0:  # the first round warms up
                    seconds[name].append(elapsed)
            bar.update()
    table = Table("part", "median s")
    for name, each in seconds.items():
        table.add_row(name, f"{statistics.median(each):.3f}")
    console.print(table)
    table = Table("price", "median", "95 % interval")
    for name, each in prices(seconds).items():
        low, high = bootstrap_interval(each)
        table.add_row(name, f"{statistics.median(each):.3f}", f"{low:.3f} to {high:.3f}")
        report[name] = {"median": statistics.median(each), "low": low, "high": high}
    console.print(table)
    if args.output is not None:
        args.output.write_text(json.dumps({**report, "seconds": seconds, "command": argv}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
