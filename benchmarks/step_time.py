"""Compare step time and peak memory of training with and without attribution, as ratios.

    python -m benchmarks.step_time --block_size 1024 --batch_size 2 --val_batch_size 1

One round times every method once. A ratio is the median over rounds of the ratio within a round, so a drift
of the machine's speed does not matter. Peak memory is measured in a fresh process for each method. Before
timing, training gradients and dot products of all methods are compared with the per-sample loop's; a mismatch
ends the program.

step_methods.py describes the methods.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.step_methods import (
    METHODS,
    Method,
    Setup,
    make_loop,
    make_methods,
    trained,
)
from foundation.paths import path_argument
from models.architectures import ARCHITECTURES

RATIOS = (
    ("graddotprod", "regular_nm"),
    ("graddotprod", "hf_nm"),
    ("graddotprod", "hf_n"),
    ("graddotprod", "graddotprod_eager"),
    ("regular_nm", "regular_nm_eager"),
    ("loop", "graddotprod"),
    ("pairwise", "graddotprod"),
    ("per_layer", "graddotprod"),
    ("token", "graddotprod"),
    ("adamw", "graddotprod"),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # of dots and gradients, relative to their norms


def list_gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters that are trained, in the order of the Hugging Face model's."""
    found = []
    for parameter in trained(getattr(model, "hf", model)):
        assert parameter.grad is not None
        found.append(parameter.grad)
    return found


def check(setup: Setup, methods: dict[str, Method], dtype: str) -> None:
    """Compare dot products and training gradients with those of the per-sample loop.

    Raises:
        SystemExit: a method's differ.
    """
    train_rows, want_dots = slice(0, setup.n), make_loop(setup)()
    want = [g.clone() for g in list_gradients(setup.hf)]
    scale = want_dots.abs().max()
    bound = TOLERANCE[dtype]
    for name, method in methods.items():
        clear(method)
        dots = method.step()
        if dots is not None:
            if dots.dim() == 2:
                dots = dots.mean(1) if name == "pairwise" else dots.sum(1)
            error = ((dots - want_dots).abs().max() / scale).item()
            if not error < 10 * bound:
                raise SystemExit(
                    f"{name}: dot products are off by {error:.1e} of the largest one; nothing is timed"
                )
        if method.rows == train_rows:
            errors = [
                ((a - b).norm() / b.norm()).item()
                for a, b in zip(list_gradients(method.model), want, strict=True)
            ]
            if not max(errors) < bound:
                raise SystemExit(
                    f"{name}: the training gradient is off by {max(errors):.1e}; nothing is timed"
                )
        clear(method)


def clear(method: Method) -> None:
    for parameter in method.model.parameters():
        parameter.grad = None


def time_step(method: Method, optimizer: torch.optim.Optimizer | None, device: str) -> float:
    start = time.perf_counter()
    method.step()
    if optimizer is not None:
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    clear(method)
    return seconds


def time_methods(
    setup: Setup, methods: dict[str, Method], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Return seconds per method and round. The order is drawn anew in each round."""
    optimizers = {name: make_optimizer(method, setup) for name, method in methods.items()}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(args.warmup + args.rounds):
        for name in order.sample(list(methods), len(methods)):
            elapsed = time_step(methods[name], optimizers[name], args.device)
            if round_ >= args.warmup:
                seconds[name].append(elapsed)
    return seconds


def make_optimizer(method: Method, setup: Setup) -> torch.optim.Optimizer | None:
    """Return an optimizer with learning rate 0, which does all its work but keeps the weights, or None."""
    return torch.optim.AdamW(method.model.parameters(), lr=0.0, fused=True) if setup.args.optimizer else None


def run_peak_process(name: str, argv: list[str]) -> int:
    """Return the peak memory of two steps of one method, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step_time", *argv, "--peak_of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_peak(args: argparse.Namespace) -> int:
    """Return the peak memory of two steps of method --peak_of in this process, in bytes."""
    setup = Setup.make(args)
    if args.peak_of.startswith("hf") or args.peak_of in ("loop", "vmap"):
        del setup.ours
    else:
        del setup.hf
    (method,) = make_methods(setup, [args.peak_of]).values()
    optimizer = make_optimizer(method, setup)
    for _ in range(2):
        time_step(method, optimizer, args.device)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def summarise(seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Return the report: "results" of the methods and "ratios" of pairs of methods."""
    results: list[dict[str, Any]] = [
        {
            "name": name,
            "median_s": statistics.median(values) if values else None,  # None: only memory was measured
            "min_s": min(values, default=None),
            "max_s": max(values, default=None),
            "peak_bytes": peaks.get(name),
        }
        for name, values in seconds.items()
    ]
    ratios: list[dict[str, Any]] = []
    for above, below in RATIOS:
        if seconds.get(above) and seconds.get(below):
            paired = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
            low, high = bootstrap_interval(paired)
            ratios.append(
                {"ratio": f"{above} / {below}", "median": statistics.median(paired), "low": low, "high": high}
            )
    return {"results": results, "ratios": ratios}


def print_results(report: dict[str, list[dict[str, Any]]], title: str) -> None:
    console = Console(highlight=False)
    if report["ratios"]:
        table = Table("ratio", "median", "95 % interval", title=title, title_justify="left")
        for row in report["ratios"]:
            table.add_row(row["ratio"], f"{row['median']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
        console.print(table)
    table = Table("method", "median s", "min s", "max s", "peak GB")
    for row in report["results"]:
        times = ["" if row[key] is None else f"{row[key]:.4f}" for key in ("median_s", "min_s", "max_s")]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        table.add_row(row["name"], *times, peak)
    console.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.step_time", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="GPT2-Small")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=2, help="n, train rows")
    parser.add_argument("--val_batch_size", type=int, default=1, help="m, validation rows")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--optimizer", action="store_true", help="include the optimizer step (fused AdamW)")
    parser.add_argument(
        "--methods", default="hf_n,hf_nm,regular_nm,graddotprod", help=f"of {','.join(METHODS)}"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no_time", action="store_true", help="measure peak memory only")
    parser.add_argument("--output", type=path_argument, help="also write the figures as JSON")
    parser.add_argument("--peak_of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    unknown = sorted(set(args.methods) - set(METHODS))
    if unknown:
        parser.error(f"--methods: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.peak_of:
        print(measure_peak(args))
        return
    seconds: dict[str, list[float]] = {name: [] for name in args.methods}
    peaks = {} if args.no_memory else {name: run_peak_process(name, argv) for name in args.methods}
    if not args.no_time:
        setup = Setup.make(args)
        methods = make_methods(setup, args.methods)
        check(setup, methods, args.dtype)
        seconds = time_methods(setup, methods, args)
    report = summarise(seconds, peaks)
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print_results(
        report,
        f"{args.architecture} T={args.block_size} n={args.batch_size} m={args.val_batch_size} {args.dtype}"
        f"{', compiled' if args.compile else ''}, "
        f"{device}",
    )
    if args.output is not None:
        args.output.write_text(
            json.dumps({**report, "command": argv, "device": device, "torch": torch.__version__}, indent=2)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
