"""A small version of benchmarks/fidelity: values against what the optimizer's own steps do without a row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fidelity.figures_one_step import ages, ceiling, compare, group_of, sums, table
from benchmarks.fidelity.one_step import Orders, run
from benchmarks.fidelity.states import N, Optimizer, Setting

T = 30  # the step that is measured
RATES: dict[Optimizer, float] = {"AdamW": 6e-4, "SGD": 6e-2}


@pytest.fixture(scope="module", autouse=True)
def few_nodes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.fidelity.one_step.NODES", 3)
        yield


@pytest.fixture(scope="module")
def states(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A state for each optimizer, with clipping at work; test_run_values.py has one without."""
    folder = tmp_path_factory.mktemp("states")
    for optimizer, lr in RATES.items():
        setting = Setting(optimizer, lr, 0.25, seed=0, layers=1, width=32, vocabulary=64)
        run(setting, data, folder, stops=(T,), orders=Orders(blocks=2, shifts=N, integral=True), again=False)
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def test_exact_values_are_what_steps_do(states: list[dict[str, Any]]) -> None:
    for state in states:
        assert state["clip_factor"][0] < 0.5
        r, slope, ratio = compare(state, "exact", "shapley")
        assert ceiling(state) > 0.98  # else the measurement could not tell
        assert r > 0.99 and slope == pytest.approx(1, abs=0.1) and ratio == pytest.approx(1, abs=0.01)
        assert compare(state, "exact", "removal")[0] > 0.7
        r, slope, ratio = compare(state, "exact", "integral")
        assert r > 0.999 and slope == pytest.approx(1, abs=0.02) and ratio == pytest.approx(1, abs=0.005)
        if state["setting"]["optimizer"] == "AdamW":
            assert (
                compare(state, "plain-0", "shapley")[0]
                < 0.5
                < 0.9
                < compare(state, "in_pass-0", "shapley")[0]
            )
        else:
            assert state["plain-0"] == pytest.approx(state["in_pass-0"], rel=1e-9)


def test_figures(states: list[dict[str, Any]]) -> None:
    lines = table(states, "shapley", group_of, ("optimizer", "gradient", "step")).splitlines()
    assert len(lines) == 2 + len(states) and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| SGD | clipped | t = 30 | 1 | ")
    assert sums(states).startswith("median 0.0%") and sums(states).endswith("in 2 states")
    assert ages(states, "removal").count("\n") == 3


def test_predictions_again(states: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """What was measured stays; what is predicted is made again."""
    state = states[0]
    setting = Setting(**state["setting"])
    path = tmp_path / f"{setting.name}-t{T}.json"
    path.write_text(json.dumps(state | {"exact": [0.0] * N, "removal": [1.0] * N}))
    run(setting, data, tmp_path, stops=(T,), orders=None, again=True)
    again = json.loads(path.read_text())
    assert again["removal"] == [1.0] * N and np.allclose(again["exact"], state["exact"], rtol=1e-9)
