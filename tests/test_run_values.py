"""Runs with values of every kind: exact, audited, at the look-ahead point, with a kept validation gradient."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import Run, TwoProcesses, start, tokens_of
from transformers import GPT2LMHeadModel

from attribution.scored_run import ScoredRun
from attribution.values import write_values
from score_store.schema import OF_STEP

N, M, STEPS = 3, 2, 5
FLAGS: dict[str, Any] = {
    "model_dtype": "float64", "max_steps": STEPS, "batch_size": N, "val_batch_size": M, "learning_rate": 3e-4,
    "lr_decay_steps": STEPS, "checkpoint_interval": 100, "direction": "auto", "log_interval": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "audited": {"audit_interval": 3, "gradient_accumulation_steps": 2},
    "exact": {"values": "exact", "grad_clip": 0.5, "exact_by_target": True},
    "kept": {"val_refresh_interval": 4, "audit_interval": 0, "gradient_accumulation_steps": 2},
    "lookahead": {"validation_point": "lookahead", "val_refresh_interval": 2, "audit_interval": 4},
    "sgd": {"optimizer": "SGD", "learning_rate": 0.5, "values": "exact", "grad_clip": 0.5},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, data: Path, results: Path) -> Run:
    run = start(data, results, run_name=request.param, **FLAGS | KINDS[request.param])
    assert run.status == 0, run.err
    return run


def exact_steps(name: str) -> set[int]:
    """Counted from 0."""
    kind = KINDS[name]
    if kind.get("values") == "exact":
        return set(range(STEPS))
    return (
        {1, 4} | set(range(kind["audit_interval"] - 1, STEPS, kind["audit_interval"]))
        if kind["audit_interval"]
        else set()
    )


def test_which_steps_are_exact_and_that_the_parts_add_up(run: Run) -> None:
    scores, name = run.scores(), run.folder.name
    assert set(scores[scores.exact_value.notna()].step) == exact_steps(name)
    some = scores.dropna(subset="exact_value").groupby("step")
    sums = some.exact_value.sum() + some[["momentum", "decay"]].first().sum(axis=1)
    assert np.allclose(sums, some.measured_fall.first(), rtol=0.15)  # the rest is of third order in the step
    assert (some[OF_STEP].nunique() == 1).all(axis=None)
    if KINDS[name].get("values") == "exact":
        assert scores.value.equals(scores.exact_value)
    else:
        first = KINDS[name].get("optimizer", "AdamW") == "AdamW"
        assert set(scores[scores.value.isna()].step) == ({0} if first else set())
        product = scores.lr * scores.clip_factor * scores.dot_product / scores.global_batch_size
        assert np.allclose(scores.value, product, rtol=1e-12, equal_nan=True)


def test_parts_by_target(run: Run) -> None:
    """What they are, tests/test_by_target.py says; here that they are kept where they are asked for."""
    scores = run.scores()
    if not KINDS[run.folder.name].get("exact_by_target"):
        assert "target_value" not in scores and ScoredRun.open(run.folder).by_word is None
        return
    parts = np.stack(scores.target_value)
    assert parts.shape == (len(scores), 8) and (np.abs(parts) > 0).all()
    np.testing.assert_allclose(parts.sum(1), scores.exact_value, rtol=1e-13)
    samples = write_values([ScoredRun.open(run.folder)], run.folder / "values").read("samples").to_pandas()
    words = pd.read_parquet(run.folder / "values" / "words.parquet")
    pd.testing.assert_frame_equal(words[["sample_id", "value"]], samples[["sample_id", "value"]], rtol=1e-13)
    np.testing.assert_allclose(np.stack(words.parts).sum(1), samples.value, rtol=1e-12)


def test_where_the_validation_loss_is_known(run: Run) -> None:
    name, scores = run.folder.name, run.scores()
    kind = KINDS[name]
    known = set(range(STEPS))
    if kind.get("validation_point") == "lookahead":
        known = set()
    elif "val_refresh_interval" in kind:
        known = set(range(0, STEPS, kind["val_refresh_interval"]))
    assert set(scores[scores.val_loss.notna()].step) == known


def test_training_is_the_same(run: Run, data: Path, results: Path) -> None:
    kind = {
        key: value
        for key, value in KINDS[run.folder.name].items()
        if key in ("optimizer", "learning_rate", "grad_clip", "gradient_accumulation_steps")
    }
    flags = {key: value for key, value in FLAGS.items() if key != "direction"} | kind
    plain = start(data, results, run_name=f"{run.folder.name}-plain", method="Regular", **flags)
    assert np.allclose(run.metrics().train_loss, plain.metrics().train_loss, rtol=1e-12, atol=0)
    for mine, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-12)


def test_resuming_is_never_having_stopped(run: Run, data: Path, results: Path) -> None:
    if run.folder.name not in ("audited", "lookahead"):
        return  # the others keep nothing that these do not keep
    flags = FLAGS | KINDS[run.folder.name]
    name = f"{run.folder.name}-in-two"
    assert start(data, results, run_name=name, **flags | {"max_steps": 3}).status == 0
    again = start(data, results, run_name=name, resume=True, **flags)
    assert again.status == 0, again.err
    pd.testing.assert_frame_equal(again.scores(), run.scores(), check_exact=True)


@pytest.mark.parametrize("name", ["audited"])
def test_two_processes_are_one(name: str, data: Path, results: Path) -> None:
    kind = {"gradient_accumulation_steps": 1} | KINDS[name]
    micro = kind["gradient_accumulation_steps"]
    flags = FLAGS | kind | {"max_steps": 2}
    alone = start(data, results, run_name=f"{name}-1", **flags | {"gradient_accumulation_steps": 2 * micro})
    run = TwoProcesses(data, results, run_name=f"{name}-2", **flags).ended()
    mine, other = (each.scores().sort_values(["step", "sample_id"]) for each in (run, alone))
    for column in ("dot_product", "value", "exact_value", *OF_STEP):
        a, b = mine[column].to_numpy(), other[column].to_numpy()
        assert np.allclose(a, b, rtol=1e-9, atol=1e-10 * np.nanmax(np.abs(b)), equal_nan=True), column


def test_a_row_s_value_is_what_the_step_would_lose_without_it(data: Path, results: Path) -> None:
    """One-step removal with the optimizer itself, Hugging Face's model, and nothing of ghostEngines: the exact value
    of each row against the change of the validation loss, in the last step of a run."""
    rows, last = 4, 2
    flags = FLAGS | {"values": "exact", "batch_size": rows, "grad_clip": 0.0, "weight_decay": 0.0}
    flags |= {"max_steps": last + 1, "checkpoint_interval": last}
    run = start(data, results, run_name="removal", **flags)
    assert run.status == 0, run.err
    before = run.folder / "checkpoints" / f"step_{last:06d}"
    state = torch.load(before / "trainer_state.pt", weights_only=True)["optimizer"]["state"]
    texts = pd.read_parquet(run.folder / "validation" / "rows.parquet").tokens.tolist()
    validation = torch.tensor(np.stack(texts), dtype=torch.int64)
    scores = run.scores().query(f"step == {last}")
    train = torch.stack([tokens_of(data, "train", row.domain, row.block, 8) for row in scores.itertuples()])

    def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss

    loaded: Any = GPT2LMHeadModel.from_pretrained(before, dtype=torch.float64)

    def after(kept: list[int]) -> float:
        model = deepcopy(loaded)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=scores.lr.iloc[0], betas=(0.9, 0.95), weight_decay=0
        )
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {key: value.clone() for key, value in state[f"hf.{name}"].items()}
        (torch.stack([loss(model, train[i : i + 1]) for i in kept]).sum() / len(train)).backward()
        optimizer.step()
        with torch.no_grad():
            return loss(model, validation).item()

    everything = after(list(range(rows)))
    removals = [after([j for j in range(rows) if j != i]) - everything for i in range(rows)]
    assert np.corrcoef(scores.exact_value, removals)[0, 1] > 0.98
    in_pass = scores.lr * scores.clip_factor * scores.dot_product / scores.global_batch_size
    assert np.corrcoef(in_pass, removals)[0, 1] > 0.5
