"""Leave groups of samples out of a whole training, and compare with the sums of their values.

    PILE_SAMPLE_DIR=... python -m benchmarks.fidelity.groups --work_dir /tmp/fidelity [--jobs 2] [--clip 0.25]

Train a small GPT-2 on ROWS rows in a seeded order and add up each row's values over its uses. Then train again
without each of GROUPS random halves of the rows, and without each of as many random tenths. The linear datamodeling
score (LDS; Park et al., TRAK, arXiv 2303.14186, who leave out halves) is Spearman's correlation, over the groups,
between the sum of the values of the rows that are left in and the measured fall of the loss on the validation rows. The
learning rate is constant after its rise, so that the training of 10 epochs is, on its way, also those of 2 and 5.

A row that is left out keeps its place in the order and has weight 0 there; the others keep their weight 1/N. That is
the question that a value answers: the same steps, without the row. (A training on the half alone has half as many
steps, and its batches are other ones.) Model, order and rows depend on the seed alone.

The methods:

in_pass    the sum over steps of --direction auto, times lr·c/n
exact      the sum over steps of --values exact
plain      the sum over steps of --direction gradient, times lr·c/n
end_dot    <∇ℓ_i, ∇L_val> at the end of training
end_cosine the same with both at length 1
bm25       BM25 of the row's tokens for those of each validation row, mean over these (bm25s)
random     numbers drawn at random

One JSON file for the values of a seed and one for each of its groups, in --work_dir/groups; what is there is not
measured again. figures.py makes the tables and the plot.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.fidelity.seeds import measure_seeds
from benchmarks.fidelity.states import Corpus, N, Rows, Setting, validation_gradient
from benchmarks.fidelity.values import METHODS, Training, order, take
from foundation.files import write_text
from foundation.progress import progress_bar

ROWS, VALIDATION = 480, 16
STOPS = (2, 5, 10)  # epochs
GROUPS = 40  # of each size
# By name: the share of the rows that a group leaves out, and the epochs after which the loss is measured
SIZES = {"half": (0.5, STOPS), "tenth": (0.1, STOPS[:1])}
STEPS = ROWS // N  # of an epoch


def groups(seed: int, size: str) -> npt.NDArray[np.bool_]:
    """Return which rows each group leaves in (GROUPS, ROWS): random ones."""
    draw = np.random.default_rng([seed, 1, list(SIZES).index(size)])
    left_in = round(ROWS * (1 - SIZES[size][0]))
    return np.stack([draw.permutation(ROWS) < left_in for _ in range(GROUPS)])


def similarity(training: Training, rows: Rows, validation: Rows) -> dict[str, list[float]]:
    """Return <∇ℓ_i, ∇L_val> of each row at the present parameters, and its cosine."""
    direction = validation_gradient(training.model, training.optimizer, validation, "current")
    flat = torch.cat([direction[name].flatten() for name, _ in training.model.named_parameters()])
    parameters = list(training.model.parameters())
    dots, cosines = [], []
    for x, y in zip(*rows, strict=True):
        loss = training.model(x[None], y[None]).mean()
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])
        dots.append(float(gradient @ flat))
        cosines.append(dots[-1] / float(gradient.norm() * flat.norm()))
    return {"end_dot": dots, "end_cosine": cosines}


def bm25(rows: Rows, validation: Rows) -> list[float]:
    """Return BM25 of each row's tokens for those of the validation rows, mean over these."""
    words = [[str(token) for token in x.tolist()] for x in rows[0]]
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    queries = [[str(token) for token in x.tolist()] for x in validation[0]]
    scores = np.mean([index.get_scores(query) for query in queries], axis=0)
    return [float(score) for score in scores]


def measure_values(
    setting: Setting, rows: Rows, validation: Rows, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train on all rows; return each method's score of each row after each of STOPS, and the losses."""
    training = Training.new(setting)
    totals = {method: np.zeros(ROWS) for method in METHODS}
    of_text = {
        "bm25": bm25(rows, validation),
        "random": np.random.default_rng([setting.seed, 2]).normal(size=ROWS).tolist(),
    }
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "loss": {"0": training.loss(validation)},
        "scores": {},
    }
    for step, numbers in enumerate(order(ROWS, max(STOPS), setting.seed), start=1):
        values = training.scored_step(take(rows, numbers), validation)
        for method in METHODS:
            totals[method][numbers] += values[method]
        advance()
        if step % STEPS == 0 and step // STEPS in STOPS:
            epochs = str(step // STEPS)
            found["loss"][epochs] = training.loss(validation)
            sums = {method: each.tolist() for method, each in totals.items()}
            found["scores"][epochs] = sums | similarity(training, rows, validation) | of_text
    return found


def measure_group(
    setting: Setting,
    rows: Rows,
    validation: Rows,
    left_in: npt.NDArray[np.bool_],
    stops: Sequence[int],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Train with the rows that are left in; return the validation loss after some epochs."""
    training = Training.new(setting)
    losses = {}
    for step, numbers in enumerate(order(ROWS, max(stops), setting.seed), start=1):
        training.step(take(rows, numbers[left_in[numbers]]))
        advance()
        if step % STEPS == 0 and step // STEPS in stops:
            losses[str(step // STEPS)] = training.loss(validation)
    return {"setting": asdict(setting), "left_in": np.flatnonzero(left_in).tolist(), "loss": losses}


def run(setting: Setting, shards: Path, folder: Path) -> None:
    """Measure one seed's values and groups, those that are not there."""
    torch.set_num_threads(1)
    corpus = Corpus(shards, setting.vocabulary)
    rows = corpus.rows("train", ROWS, setting.seed)
    validation = corpus.rows("val", VALIDATION, setting.seed)
    # By name of the file: what measures it, and in how many epochs
    work: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {
        "values": (partial(measure_values, setting, rows, validation), max(STOPS))
    }
    for size, (_, stops) in SIZES.items():
        for number, left_in in enumerate(groups(setting.seed, size)):
            measured = partial(measure_group, setting, rows, validation, left_in, stops)
            work[f"{size}{number:02}"] = measured, max(stops)
    todo = {folder / f"{setting.name}-{name}.json": each for name, each in work.items()}
    todo = {path: each for path, each in todo.items() if not path.exists()}
    with progress_bar(setting.name, sum(epochs for _, epochs in todo.values()) * STEPS, "step") as bar:
        for path, (measure, _) in todo.items():
            write_text(path, json.dumps(measure(bar.update)))


if __name__ == "__main__":
    measure_seeds(sys.argv[1:], "groups", __doc__.split("\n")[0], 3, run)
