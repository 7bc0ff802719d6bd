"""Measure how long the effect of a row in one step lasts.

    PILE_SAMPLE_DIR=... python -m benchmarks.fidelity.later --work_dir /tmp/fidelity

At some steps of small GPT-2s, take the step without one row, and go on with the same later batches: how much higher is
the validation loss than with that row, after 1 step, after 5 and after 20? A value speaks of the first of these
numbers. All of it is in float64. Each state is a JSON file in --work_dir/later.
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.one_step import Step, predictions
from benchmarks.fidelity.seeds import measure_seeds
from benchmarks.fidelity.states import Corpus, N, Setting, State, clip, set_rate, train
from foundation.files import write_text
from foundation.progress import progress_bar

STOPS = (20, 200, 600)  # early, middle, late
AGES = (1, 5, 20)  # steps, of which the first is the one without the row


def losses_later(state: State, corpus: Corpus, left_out: int | None) -> list[float]:
    """Return the validation loss after each number of steps in AGES. left_out: a row of the first step."""
    model, optimizer = deepcopy(
        (state.model, state.optimizer)
    )  # at once: the copied optimizer has the copied model
    found = []
    for age in range(1, max(AGES) + 1):
        t = state.t + age - 1
        set_rate(optimizer, state.setting, t)
        kept = [row for row in range(N) if age > 1 or row != left_out]
        losses = model(*(each[kept] for each in corpus.train_rows(state.setting, t)))
        (losses.mean() * (len(kept) / N)).backward()
        clip(model, state.setting.clip)
        optimizer.step()
        optimizer.zero_grad()
        if age in AGES:
            with torch.no_grad():
                found.append(model(*state.validation).mean().item())
    return found


def measure(state: State, corpus: Corpus, advance: Callable[[], None]) -> dict[str, Any]:
    """Return each row's effect after each number of steps, and what the methods predict."""
    everything = losses_later(state, corpus, None)
    effects: list[list[float]] = [[] for _ in AGES]
    for row in range(N):
        for each, without, loss in zip(effects, losses_later(state, corpus, row), everything, strict=True):
            each.append(without - loss)
        advance()
    predicted = predictions(Step(state))
    return {
        "setting": asdict(state.setting),
        "t": state.t,
        "effects": dict(zip(map(str, AGES), effects, strict=True)),
        "exact": predicted["exact"],
        "in_pass": predicted["in_pass-0"],
    }


def run(setting: Setting, shards: Path, folder: Path) -> None:
    """Train and measure one setting, unless that is done."""
    torch.set_num_threads(1)
    paths = {t: folder / f"{setting.name}-t{t}.json" for t in STOPS}
    wanted = tuple(t for t, path in paths.items() if not path.exists())
    if not wanted:
        return
    corpus = Corpus(shards, setting.vocabulary)
    with progress_bar(setting.name, max(wanted) + N * len(wanted), "step") as bar:
        for state in train(setting, corpus, wanted, bar.update):
            write_text(paths[state.t], json.dumps(measure(state, corpus, bar.update)))


if __name__ == "__main__":
    measure_seeds(sys.argv[1:], "later", __doc__.split("\n")[0], seeds=4, run=run)
