"""Find corrupted samples by their values, in a model that is past its first hundred steps, and train without them.

    PILE_SAMPLE_DIR=... python -m benchmarks.fidelity.corrupted --work_dir /tmp/fidelity [--jobs 2]

Train a small GPT-2 for FIRST steps on clean rows, then for EPOCHS over ROWS other ones, of which a tenth is corrupted:

shuffled   the row's tokens are in random order, targets with them
targets    the targets are tokens drawn at random from all rows' targets, by frequency

Each score adds up over the uses of a row. The AUROC is the probability that a corrupted row scores below a clean one:

in_pass    lr·c/n·<P∘G, ∇ℓ_i>, --direction auto
exact      --values exact
plain      lr·c/n·<G, ∇ℓ_i>, --direction gradient
loss       minus the row's own loss when it is used: the baseline, which needs no validation rows

Curation: the second phase again, from the same model and in the same order, without the tenth of the rows that a score
ranks lowest, without as many random rows (mean of RANDOM draws), or without those that are corrupted. A row that is
dropped keeps its place in the order and has weight 0 there. The losses are those of the VALIDATION rows that the values
speak of, and of HELD_OUT rows of the test split.

Each seed and kind is a JSON file in --work_dir/corrupted; what is there is not measured again. figures.py makes the
tables and the plot.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import compute_auroc
from benchmarks.fidelity.seeds import measure_seeds
from benchmarks.fidelity.states import Corpus, N, Rows, Setting
from benchmarks.fidelity.values import METHODS, Numbers, Training, Values, order, take
from foundation.files import write_text
from foundation.progress import progress_bar

FIRST = 600  # steps of the first phase: the order of tokens begins to matter to the model
ROWS, SHARE, EPOCHS = 480, 0.1, 2
VALIDATION, HELD_OUT = 16, 256
RANDOM = 5  # random rankings
KINDS = ("shuffled", "targets")
SCORES = {**METHODS, "loss": "own loss"}
STEPS = EPOCHS * ROWS // N  # of the second phase
TRAININGS = 2 + len(SCORES) + RANDOM  # of the second phase, without the one that is scored

Advance = Callable[[], None]


def corrupt(rows: Rows, numbers: Numbers, kind: str, seed: int) -> Rows:
    """Return a copy of the rows in which those with these numbers are corrupted."""
    draw = np.random.default_rng([seed, 3])
    x, y = (each.clone() for each in rows)
    for number in numbers:
        if kind == "shuffled":
            tokens = torch.cat([x[number, :1], y[number]])  # (T+1,)
            tokens = tokens[torch.from_numpy(draw.permutation(len(tokens)))]
            x[number], y[number] = tokens[:-1], tokens[1:]
        else:
            y[number] = rows[1].flatten()[torch.from_numpy(draw.integers(rows[1].numel(), size=y.shape[1]))]
    return x, y


def first_phase(setting: Setting, corpus: Corpus, advance: Advance) -> Training:
    """Return a training after FIRST steps on clean rows, new ones at each step."""
    training = Training.new(setting)
    for t in range(1, FIRST + 1):
        training.step(corpus.rows("train", N, seed=setting.seed * 1_000_003 + t))
        advance()
    return training


def score(training: Training, rows: Rows, validation: Rows, advance: Advance) -> Values:
    """Train the second phase on all rows and return the sum of each score over the uses of each row."""
    totals = {name: np.zeros(ROWS) for name in SCORES}
    for numbers in order(ROWS, EPOCHS, training.setting.seed):
        values = training.scored_step(take(rows, numbers), validation)
        for name, total in totals.items():
            total[numbers] += -values[name] if name == "loss" else values[name]
        advance()
    return totals


def train_without(training: Training, rows: Rows, dropped: Numbers, advance: Advance) -> Training:
    """Train the second phase without some rows."""
    kept = np.ones(ROWS, bool)
    kept[dropped] = False
    for numbers in order(ROWS, EPOCHS, training.setting.seed):
        training.step(take(rows, numbers[kept[numbers]]))
        advance()
    return training


def measure(setting: Setting, corpus: Corpus, kind: str, advance: Advance) -> dict[str, Any]:
    """Return the AUROC of each score, and the losses without the rows that each one ranks lowest."""
    seed, count = setting.seed, round(SHARE * ROWS)
    draw = np.random.default_rng([seed, 4])
    bad = draw.permutation(ROWS)[:count]
    rows = corrupt(corpus.rows("train", ROWS, seed), bad, kind, seed)
    validation, held_out = corpus.rows("val", VALIDATION, seed), corpus.rows("test", HELD_OUT, seed)
    start = first_phase(setting, corpus, advance)
    scores = score(start.copy(), rows, validation, advance)
    clean = np.setdiff1d(np.arange(ROWS), bad)
    dropped = {"nothing": [bad[:0]], "corrupted": [bad]}
    dropped |= {name: [np.argsort(each, kind="stable")[:count]] for name, each in scores.items()}
    dropped["random"] = [draw.permutation(ROWS)[:count] for _ in range(RANDOM)]
    parts = {"validation": validation, "held_out": held_out}
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "kind": kind,
        "auroc": {name: compute_auroc(each[bad], each[clean]) for name, each in scores.items()},
        "found": {name: float(np.isin(dropped[name][0], bad).mean()) for name in scores},
        "start": {part: start.loss(some) for part, some in parts.items()},
        "end": {part: {name: [] for name in dropped} for part in parts},
    }
    for name, every in dropped.items():
        for each in every:
            trained = train_without(start.copy(), rows, each, advance)
            for part, some in parts.items():
                found["end"][part][name].append(trained.loss(some))
    return found


def run(setting: Setting, shards: Path, folder: Path) -> None:
    """Measure one seed's kinds of corruption, those that are not there."""
    torch.set_num_threads(1)
    corpus = Corpus(shards, setting.vocabulary)
    for kind in KINDS:
        path = folder / f"{setting.name}-{kind}.json"
        if not path.exists():
            with progress_bar(path.stem, FIRST + (1 + TRAININGS) * STEPS, "step") as bar:
                write_text(path, json.dumps(measure(setting, corpus, kind, bar.update)))


if __name__ == "__main__":
    measure_seeds(sys.argv[1:], "corrupted", __doc__.split("\n")[0], 4, run)
