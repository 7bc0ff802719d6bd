"""Step time and peak memory of training with and without attribution, interleaved, as ratios.

    python -m benchmarks.step_time --block_size 1024 --batch_size 2 --val_batch_size 1

One round times every method once, in turn; ratios are medians over the rounds of the ratio within a round, so
that a machine whose speed drifts does not matter. Peak memory is measured in a fresh process for each method.
Before anything is timed, all methods' training gradients and dot products are compared with those of the
per-sample loop; wrong ones are not timed.

    hf_n, hf_nm            the ordinary Hugging Face model, one training step on n and on n+m rows
    regular_n, regular_nm  this repository's method Regular, likewise
    graddotprod            method GradDotProd: a training step on n rows and the dot products with m
    gram, project, instantiate   the same with one contraction strategy forced on every layer
    regular_nm_eager, graddotprod_eager   with --compile: the same two not compiled
    pairwise, per_layer    the same with the full matrix of scores, and with a score for each layer
    adamw                  the same with direction "adamw" (in place of sqrt(v) + eps, ones: the same numbers)
    loop                   the dot products by hand: one backward pass for each row
    vmap                   the dot products from torch.func per-sample gradients
"""

import argparse
import copy
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ghostEngines import GradDotProdEngine
from model_setup import ARCHITECTURES, CausalLM, architecture_config, set_up_blocks

ENGINE_OPTIONS = {
    "graddotprod": {},
    "gram": {"strategy": "gram"},
    "project": {"strategy": "project"},
    "instantiate": {"strategy": "instantiate"},
    "pairwise": {"granularity": "pairwise"},
    "per_layer": {"granularity": "per_layer"},
    "adamw": {"direction": "adamw"},
}
EAGER = {"regular_nm_eager": "regular_nm", "graddotprod_eager": "graddotprod"}
METHODS = ("hf_n", "hf_nm", "regular_n", "regular_nm", *ENGINE_OPTIONS, *EAGER, "loop", "vmap")
RATIOS = (
    ("graddotprod", "regular_nm"),
    ("graddotprod", "hf_nm"),
    ("graddotprod", "hf_n"),
    ("graddotprod", "graddotprod_eager"),
    ("regular_nm", "regular_nm_eager"),
    ("loop", "graddotprod"),
    ("pairwise", "graddotprod"),
    ("per_layer", "graddotprod"),
    ("adamw", "graddotprod"),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # of dots and gradients, relative to their norms


@dataclass
class Setup:
    """What all methods share: the same weights, the same rows, train rows first."""

    hf: GPT2LMHeadModel
    ours: CausalLM
    x: Tensor
    y: Tensor
    n: int
    m: int
    autocast: Callable[[], torch.autocast]
    args: argparse.Namespace

    @classmethod
    def make(cls, args: argparse.Namespace) -> "Setup":
        torch.manual_seed(0)
        config = architecture_config(args.architecture)
        ours = CausalLM(GPT2LMHeadModel(config))
        plain = architecture_config(args.architecture)
        plain.activation_function = "gelu_new"  # what Hugging Face's GPT-2 runs
        hf = GPT2LMHeadModel(plain)
        hf.load_state_dict(ours.hf.state_dict())
        if args.activation_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        if args.compile:
            for block in hf.transformer.h:
                block.compile()
        rows = args.batch_size + args.val_batch_size
        tokens = torch.randint(50257, (rows, args.block_size + 1))
        x, y = tokens[:, :-1].to(args.device), tokens[:, 1:].to(args.device)

        def autocast() -> torch.autocast:
            return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")

        return cls(
            hf.to(args.device).train(),
            ours.to(args.device).train(),
            x,
            y,
            args.batch_size,
            args.val_batch_size,
            autocast,
            args,
        )

    def own_model(self, name: str) -> CausalLM:
        """Modules of its own around the shared parameters, for a method to attach to and to compile."""
        model = copy.deepcopy(self.ours, {id(parameter): parameter for parameter in self.ours.parameters()})
        compiled = self.args.compile and name not in EAGER
        set_up_blocks(model, compiled=compiled, checkpointing=self.args.activation_checkpointing)
        return model


@dataclass
class Method:
    """step() runs one step and returns the dot products, None for plain training; model holds the gradients
    after it."""

    model: nn.Module
    step: Callable[[], Tensor | None]
    rows: slice


def hf_loss(setup: Setup, rows: slice) -> Tensor:
    with setup.autocast():
        logits = setup.hf(setup.x[rows], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), setup.y[rows].flatten())


def make_hf(setup: Setup, rows: slice) -> Callable[[], None]:
    def step() -> None:
        hf_loss(setup, rows).backward()

    return step


def make_regular(setup: Setup, model: CausalLM, rows: slice) -> Callable[[], None]:
    def step() -> None:
        with setup.autocast():
            losses = model(setup.x[rows], setup.y[rows])
        losses.mean().backward()

    return step


def make_engine(setup: Setup, model: CausalLM, **options: object) -> Callable[[], Tensor]:
    engine = GradDotProdEngine(model, setup.m, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1.0, fused=True)
    if engine.direction == "adamw":  # which divides by sqrt(0) + 1 after a step of zero gradients
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    engine.attach(optimizer)

    def step() -> Tensor:
        with setup.autocast():
            losses = model(setup.x, setup.y)
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()
        return engine.dot_products()

    return step


def make_loop(setup: Setup) -> Callable[[], Tensor]:
    """Validation gradient first, then a backward pass per train row; leaves the training gradient in
    .grad."""
    parameters = list(setup.hf.parameters())

    def step() -> Tensor:
        n, m = setup.n, setup.m
        total = [torch.zeros_like(p) for p in parameters]
        direction = [torch.zeros_like(p) for p in parameters]
        dots = []
        for row in [*range(n, n + m), *range(n)]:
            gradients = torch.autograd.grad(hf_loss(setup, slice(row, row + 1)), parameters)
            if row >= n:
                torch._foreach_add_(direction, gradients, alpha=1 / m)
            else:
                dots.append(
                    sum(
                        torch.dot(g.flatten(), d.flatten()) for g, d in zip(gradients, direction, strict=True)
                    )
                )
                torch._foreach_add_(total, gradients, alpha=1 / n)
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        return torch.stack(dots)

    return step


def make_vmap(setup: Setup) -> Callable[[], Tensor]:
    """torch.func: all rows' gradients at once, n+m times the model in memory."""
    parameters = {name: p.detach() for name, p in setup.hf.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with setup.autocast():
            logits = torch.func.functional_call(setup.hf, weights, (x[None],), {"use_cache": False}).logits[0]
        return nn.functional.cross_entropy(logits.float(), y)

    gradients_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step() -> Tensor:
        gradients = gradients_of(parameters, setup.x, setup.y)
        dots = torch.zeros(setup.n, device=setup.x.device)
        for name, parameter in setup.hf.named_parameters():
            rows = gradients.pop(name).flatten(1)
            dots += rows[: setup.n] @ rows[setup.n :].mean(0)
            parameter.grad = rows[: setup.n].mean(0).view_as(parameter)
        return dots

    return step


def make_methods(setup: Setup, names: list[str]) -> dict[str, Method]:
    train, both = slice(0, setup.n), slice(0, setup.n + setup.m)
    methods = {}
    for name in names:
        kind = EAGER.get(name, name)
        if kind in ("hf_n", "hf_nm"):
            rows = train if kind == "hf_n" else both
            methods[name] = Method(setup.hf, make_hf(setup, rows), rows)
        elif kind in ("regular_n", "regular_nm"):
            rows, model = train if kind == "regular_n" else both, setup.own_model(name)
            methods[name] = Method(model, make_regular(setup, model, rows), rows)
        elif kind in ENGINE_OPTIONS:
            model = setup.own_model(name)
            methods[name] = Method(model, make_engine(setup, model, **ENGINE_OPTIONS[kind]), train)
        else:
            make = make_loop if kind == "loop" else make_vmap
            methods[name] = Method(setup.hf, make(setup), train)
    return methods


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in (model.hf if isinstance(model, CausalLM) else model).parameters()]


def check(setup: Setup, methods: dict[str, Method], dtype: str) -> None:
    """SystemExit if a method's dot products or training gradients are not those of the per-sample loop."""
    reference = Method(setup.hf, make_loop(setup), slice(0, setup.n))
    want_dots = reference.step()
    want = [g.clone() for g in gradients(setup.hf)]
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
        if method.rows == reference.rows:
            errors = [
                ((a - b).norm() / b.norm()).item() for a, b in zip(gradients(method.model), want, strict=True)
            ]
            if not max(errors) < bound:
                raise SystemExit(
                    f"{name}: the training gradient is off by {max(errors):.1e}; nothing is timed"
                )
        clear(method)


def clear(method: Method) -> None:
    for parameter in method.model.parameters():
        parameter.grad = None


def timed_step(method: Method, optimizer: torch.optim.Optimizer | None, device: str) -> float:
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
    """Seconds per method and round. The order changes from round to round, so that no method always follows
    the same one."""
    optimizers = {name: make_optimizer(method, setup) for name, method in methods.items()}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(args.warmup + args.rounds):
        for name in order.sample(list(methods), len(methods)):
            elapsed = timed_step(methods[name], optimizers[name], args.device)
            if round_ >= args.warmup:
                seconds[name].append(elapsed)
    return seconds


def make_optimizer(method: Method, setup: Setup) -> torch.optim.Optimizer | None:
    """With a learning rate of zero: all of the work, and the weights stay comparable."""
    return torch.optim.AdamW(method.model.parameters(), lr=0.0, fused=True) if setup.args.optimizer else None


def peak_bytes(name: str, argv: list[str]) -> int:
    """Peak memory of two steps of one method in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step_time", *argv, "--peak_of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_peak(args: argparse.Namespace) -> int:
    setup = Setup.make(args)
    if args.peak_of.startswith("hf") or args.peak_of in ("loop", "vmap"):
        del setup.ours
    else:
        del setup.hf
    (method,) = make_methods(setup, [args.peak_of]).values()
    optimizer = make_optimizer(method, setup)
    for _ in range(2):
        timed_step(method, optimizer, args.device)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def results_of(seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, list[dict[str, object]]]:
    results = [
        {
            "name": name,
            "median_s": statistics.median(values) if values else None,  # None: only memory was measured
            "min_s": min(values, default=None),
            "max_s": max(values, default=None),
            "peak_bytes": peaks.get(name),
        }
        for name, values in seconds.items()
    ]
    ratios = []
    for above, below in RATIOS:
        if seconds.get(above) and seconds.get(below):
            paired = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
            low, high = interval(paired)
            ratios.append(
                {"ratio": f"{above} / {below}", "median": statistics.median(paired), "low": low, "high": high}
            )
    return {"results": results, "ratios": ratios}


def print_results(report: dict[str, list[dict[str, object]]], title: str) -> None:
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
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), default="GPT2-Small")
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
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--no_time", action="store_true", help="peak memory alone")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
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
    peaks = {} if args.no_memory else {name: peak_bytes(name, argv) for name in args.methods}
    if not args.no_time:
        setup = Setup.make(args)
        methods = make_methods(setup, args.methods)
        check(setup, methods, args.dtype)
        seconds = time_methods(setup, methods, args)
    report = results_of(seconds, peaks)
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
