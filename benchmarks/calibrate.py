"""Measure TILE_NUMEL (contraction.py) and PASSES (strategies/registry.py) of ghostEngines on this machine.

    python -m benchmarks.calibrate --rounds 7

For GPT2-Small's weights and some batch shapes, time `gram`, and `instantiate` with several tile sizes.
Compare them with the plain product that gives the gradient of all n+m rows. Printed are the fastest rounds as
ratios to that product, and PASSES: the extra cost of `instantiate` in multiply-adds per entry of one sample's
gradient. Run it on an otherwise idle machine.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ghostEngines import contraction
from ghostEngines.contraction import Split, add_gradient
from ghostEngines.descriptions import Matrix
from ghostEngines.memory import Scratch
from ghostEngines.sinks import DotProducts, Site
from ghostEngines.strategies import choose_strategy

WEIGHTS = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
BATCHES = ((16, 64, 1), (8, 128, 1), (8, 256, 1), (4, 512, 1), (2, 1024, 1), (2, 1024, 4))  # n, T, m
CHOSEN = contraction.TILE_NUMEL
TILES = (CHOSEN >> 2, CHOSEN, CHOSEN << 2)


def make_candidates(left: Tensor, right: Tensor, split: Split) -> dict[str, Callable[[], object]]:
    """Return the functions to time, by name. `plain` is the gradient of all rows in one product."""
    scratch = Scratch()

    def plain() -> None:
        add_gradient(left, right, left.new_empty(left.shape[2], right.shape[2]), fresh=True)

    site = Site(torch.Size((left.shape[2], right.shape[2])))

    def contract(strategy: str) -> None:
        DotProducts(split, scratch, strategy).take(site, Matrix(left, right))

    def instantiate(tile: int) -> None:
        contraction.TILE_NUMEL = tile
        contract("instantiate")

    timed: dict[str, Callable[[], object]] = {"plain": plain}
    timed["gram"] = lambda: contract("gram")
    return timed | {f"tile {tile}": lambda tile=tile: instantiate(tile) for tile in TILES}


def measure_fastest(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each function's least seconds over interleaved rounds, after one warm-up round."""
    seconds = dict.fromkeys(timed, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if round_ > 0:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.calibrate", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    names = ["gram", *(f"tile {tile}" for tile in TILES)]
    table = Table("n", "T", "m", "p", "d", *names, "passes", "chosen")
    torch.manual_seed(0)
    for n, positions, m in BATCHES:
        for p, d in WEIGHTS:
            split = Split(n, m)
            left, right = torch.randn(n + m, positions, p), torch.randn(n + m, positions, d)
            seconds = measure_fastest(make_candidates(left, right, split), args.rounds)
            per_multiply_add = seconds["plain"] / ((n + m) * positions * p * d)
            extra = seconds[f"tile {CHOSEN}"] - seconds["plain"]
            ratios = [f"{seconds[name] / seconds['plain']:.2f}" for name in names]
            shape = [str(each) for each in (n, positions, m, p, d)]
            passes = f"{extra / (n * p * d) / per_multiply_add:.0f}"
            table.add_row(*shape, *ratios, passes, choose_strategy(split, positions, p, d))
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
