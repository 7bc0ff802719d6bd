"""Compare values with what they claim: what one row of a batch does in one step of the optimizer.

    PILE_SAMPLE_DIR=... python -m benchmarks.fidelity.one_step --work_dir /tmp/fidelity [--jobs 2]

Train small GPT-2s on real text, stop before some steps, and measure in float64 there, with the optimizer itself:

removal   L(the step without row i) - L(the step with all rows), where the other rows keep their weights
shapley   the mean of row i's effect over random orders in which the rows are added, each order also in reverse and,
          for the small models, with all its cyclic shifts, so that each row has each place equally often
integral  the Aumann-Shapley share, which a value is by definition: the derivative of the fall by row i's weight,
          integrated numerically while all weights grow together from 0 to 1; shapley is its like for few rows

The methods are compared with both by Pearson's correlation within the batch and by the slope of a regression of the
measured on the predicted:

plain      lr·c/n·<G, ∇ℓ_i>, --direction gradient
in_pass    --direction auto; its age is the number of steps since its validation gradient was computed
lookahead  the same with --validation_point lookahead
exact      --values exact

Each state is a JSON file in --work_dir, and is not measured again; figures.py makes tables and plots of them. With
--again the predictions of states that are there are made again, as after a change of the engine.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import make_sample_shards
from benchmarks.fidelity.states import WARMUP, Corpus, M, N, Optimizer, Setting, State, clip, train
from benchmarks.fidelity.values import dot_products
from foundation.files import write_text
from foundation.paths import path_argument
from foundation.progress import progress_bar
from ghostEngines import GradDotProdEngine

RATES: dict[Optimizer, tuple[float, ...]] = {
    "AdamW": (1e-4, 6e-4, 3e-3),
    "SGD": (1e-2, 6e-2, 3e-1),  # for as much progress in a step
}
STOPS = (20, 200, 600)  # early, middle, late
SMALL = [
    Setting(optimizer, lr, clip, seed, width=64 if seed % 2 == 0 else 128)
    for seed in range(4)
    for optimizer, rates in RATES.items()
    for lr in rates
    for clip in (0.0, 0.25)
]
LARGE = [
    Setting(optimizer, rates[1], 0.25, seed, layers=4, width=256, vocabulary=50304)
    for seed in range(2)
    for optimizer, rates in RATES.items()
]
MEASURED_BY_SHAPLEY = {6e-4, 6e-2}  # learning rates
NODES = 8  # of the quadrature, below and above the weight at which clipping sets in


class Step:
    """One state's coming step, to be made with any weights of its rows, again and again."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._parameters = list(state.model.parameters())
        self._before = [p.detach().clone() for p in self._parameters]
        self._moments = {
            p: {key: value.clone() for key, value in each.items()}
            for p, each in state.optimizer.state.items()
        }
        self._rows = []
        for x, y in zip(*state.train, strict=True):
            loss = state.model(x[None], y[None]).mean()
            self._rows.append(torch.autograd.grad(loss, self._parameters))

    def set_gradients(self, weights: list[float]) -> float:
        """Set `.grad` to the weighted sum of the rows' gradients over N, clipped, and return the factor."""
        for number, parameter in enumerate(self._parameters):
            parameter.grad = sum(
                (w / N * row[number] for w, row in zip(weights, self._rows, strict=True) if w),
                start=torch.zeros_like(parameter),
            )
        return clip(self.state.model, self.state.setting.clip)

    def loss_after(self, weights: list[float]) -> float:
        """Return the validation loss after the step with these weights of the rows; the state is as before."""
        self.set_gradients(weights)
        self.state.optimizer.step()
        with torch.no_grad():
            loss: float = self.state.model(*self.state.validation).mean().item()
            torch._foreach_copy_(self._parameters, self._before)
        for parameter, moments in self._moments.items():
            for key, value in moments.items():
                self.state.optimizer.state[parameter][key].copy_(value)
        self.state.optimizer.zero_grad()
        return loss


def removals(step: Step) -> list[float]:
    """Return what the step would lose without each row, in nats."""
    everything = step.loss_after([1.0] * N)
    return [step.loss_after([float(j != i) for j in range(N)]) - everything for i in range(N)]


@dataclass(frozen=True)
class Orders:
    """The orders in which rows are added: `blocks` random ones, each with its cyclic shifts, and all in reverse."""

    blocks: int
    shifts: int
    integral: bool  # compute the integral, too, in 4 · NODES · N more steps

    @property
    def pairs(self) -> int:
        """Return how many pairs of an order and its reverse there are."""
        return self.blocks * self.shifts


def shapley(
    step: Step, orders: Orders, seed: int, advance: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Return Shapley values, in nats, and their standard errors, from the spread of the blocks."""
    draw = np.random.default_rng(seed)
    of_blocks = []
    for _ in range(orders.blocks):
        order, falls = draw.permutation(N), np.zeros(N)
        for shift in range(orders.shifts):
            shifted = np.roll(order, shift)
            for each in (shifted, shifted[::-1]):
                weights = [0.0] * N
                loss = step.loss_after(weights)
                for row in each:
                    weights[row] = 1.0
                    before, loss = loss, step.loss_after(weights)
                    falls[row] += (before - loss) / (2 * orders.shifts)
            advance()
        of_blocks.append(falls)
    errors = np.std(of_blocks, axis=0, ddof=1) / np.sqrt(orders.blocks)
    return np.mean(of_blocks, axis=0).tolist(), errors.tolist()


def integral(step: Step, clip_factor: float) -> list[float]:
    """Return Aumann-Shapley shares, in nats, by Gauss-Legendre quadrature and central differences.

    Args:
        clip_factor: the weight of all rows at which clipping sets in, where the derivative jumps.
    """
    shares, delta = np.zeros(N), 1e-5
    nodes, sizes = np.polynomial.legendre.leggauss(NODES)
    bounds = [0.0, clip_factor, 1.0] if clip_factor < 1 else [0.0, 0.5, 1.0]
    for low, high in pairwise(bounds):
        for node, size in zip(nodes, sizes, strict=True):
            weight = low + (high - low) * (node + 1) / 2
            for row in range(N):
                losses = [
                    step.loss_after([weight + sign * delta * (row == other) for other in range(N)])
                    for sign in (-1, 1)
                ]
                shares[row] += (losses[0] - losses[1]) / (2 * delta) * size * (high - low) / 2
    return shares.tolist()


def predictions(step: Step) -> dict[str, list[float]]:
    """Return each method's values of the rows, in nats; "in_pass-5" is of a direction that is 5 steps old."""
    state = step.state
    factor = step.set_gradients([1.0] * N)
    engine = GradDotProdEngine(state.model, M, direction="auto", guard=False)
    plain = GradDotProdEngine(state.model, M, direction="gradient", guard=False)
    engine.attach(state.optimizer)
    rows = [partial(state.model, *state.train)]
    exact = engine.exact_values(rows, state.losses(state.validation), clip_factor=factor, global_rows=N)
    found = {"exact": exact.values[0].tolist()}
    scale = engine.lr * factor / N
    engine.detach()
    for method, point, user in (
        ("plain", "current", plain),
        ("in_pass", "current", engine),
        ("lookahead", "lookahead", engine),
    ):
        user.attach(state.optimizer)
        for age, direction in enumerate(state.gradients[point]):
            if method == "plain" and age > 0:
                break
            dots = dot_products(user, state.model, state.train, direction)
            found[f"{method}-{age}"] = (dots * scale).tolist()
        user.detach()
    state.optimizer.zero_grad()
    return found | {"clip_factor": [factor], "cosine": [exact.cosine]}


def measure(state: State, orders: Orders | None, advance: Callable[[], None]) -> dict[str, Any]:
    """Return everything that is measured and predicted at a state."""
    for group in state.optimizer.param_groups:
        assert group["lr"] == state.setting.lr * min(1.0, state.t / WARMUP)
    step = Step(state)
    values: dict[str, Any] = {"removal": removals(step), **predictions(step)}
    if orders is not None:
        if orders.integral:
            values["integral"] = integral(step, values["clip_factor"][0])
        values["shapley"], values["shapley_error"] = shapley(step, orders, state.t, advance)
    return {"setting": asdict(state.setting), "t": state.t, **values}


def run(
    setting: Setting, shards: Path, folder: Path, stops: tuple[int, ...], orders: Orders | None, again: bool
) -> None:
    """Train and measure one setting, unless that is done.

    Args:
        orders: for Shapley values; None: without them.
        again: make the predictions of the states that are there again, instead of measuring those that are not.
    """
    torch.set_num_threads(1)
    paths = {t: folder / f"{setting.name}-t{t}.json" for t in stops}
    wanted = tuple(t for t, path in paths.items() if path.exists() == again)
    if not wanted:
        return
    corpus = Corpus(shards, setting.vocabulary)
    pairs = 0 if again or orders is None else orders.pairs * len(wanted)
    with progress_bar(setting.name, max(wanted) + pairs, "step") as bar:
        for state in train(setting, corpus, wanted, bar.update):
            path = paths[state.t]
            if again:
                found = json.loads(path.read_text()) | predictions(step := Step(state))
                if orders is not None and orders.integral:
                    found["integral"] = integral(step, found["clip_factor"][0])
            else:
                found = measure(state, orders, bar.update)
            write_text(path, json.dumps(found))


def settings_of(size: str) -> Iterator[tuple[Setting, tuple[int, ...], Orders | None]]:
    """Yield each setting, the steps at which it is measured, and the orders for Shapley values."""
    for setting in SMALL if size == "small" else LARGE:
        orders = (
            Orders(3, shifts=N, integral=True) if size == "small" else Orders(5, shifts=1, integral=False)
        )
        stops = STOPS if size == "small" else (100, 300)
        yield setting, stops, orders if setting.lr in MEASURED_BY_SHAPLEY else None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.fidelity.one_step", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--work_dir", type=path_argument, required=True, help="shards and one file a state")
    parser.add_argument("--jobs", type=int, default=1, help="settings at a time, of one thread each")
    parser.add_argument("--sizes", default="small,large", help="of the models")
    parser.add_argument("--again", action="store_true", help="only make predictions again")
    args = parser.parse_args(argv)
    shards = make_sample_shards(args.work_dir / "shards")
    folder = args.work_dir / "one_step"
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        for size in args.sizes.split(","):
            for done in [
                pool.submit(run, setting, shards, folder, stops, orders, args.again)
                for setting, stops, orders in settings_of(size)
            ]:
                done.result()


if __name__ == "__main__":
    main(sys.argv[1:])
