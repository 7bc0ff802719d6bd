"""Short runs, from the command line to what lies in the folder of results."""

import hashlib
import json
import logging
import math
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from run_helpers import DOMAINS, ROOT, Run, command, environment, python, start, tokens_of, tree
from transformers import GPT2LMHeadModel

import evaluation
import main
from attribution import values
from attribution.screen import first_words
from benchmarks.oracle import per_sample
from data_processing.tokenizers import get_tokenizer
from foundation.errors import UserError
from ghostEngines import AttachError
from score_store.writer import open_scores

STEPS, N, M, T = 20, 3, 2, 8
FLAGS = {
    "model_dtype": "float64", "max_steps": STEPS, "batch_size": N, "val_batch_size": M, "block_size": T,
    "learning_rate": 1e-3, "warmup_step": 4, "lr_decay_steps": 20, "eval_interval": 8, "eval_bs": 4,
    "eval_iter": 2, "dot_prod_save_interval": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def scored(data: Path, results: Path) -> Run:
    """20 steps of method GradDotProd, in float64."""
    return start(data, results, run_name="scored", **FLAGS)


@pytest.fixture(scope="module")
def plain(data: Path, results: Path) -> Run:
    """The same with method Regular."""
    return start(data, results, run_name="plain", method="Regular", **FLAGS)


def hf_logits(model: GPT2LMHeadModel, x: torch.Tensor) -> torch.Tensor:
    """The output layer written out: nothing of ghostEngines."""
    return model.transformer(x).last_hidden_state @ model.transformer.wte.weight.T


# ---- what a run leaves behind


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), AttachError("no rule covers it")])
def test_an_error_of_the_program_is_no_user_error(
    error: Exception, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError of ours, or of PyTorch, keeps its traceback."""

    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(main, "build_optimizer", fails)
    if isinstance(error, UserError):
        run = start(data, tmp_path, run_name="a")
        assert (run.status, run.err.splitlines()[-1]) == (2, f"main.py: error: {error}")
    else:
        with pytest.raises(ValueError, match="a fault of ours"):
            start(data, tmp_path, run_name="a")


def test_the_folder_of_a_run(scored: Run) -> None:
    assert scored.status == 0
    names = {"config.json", "grad_dotprods", "metrics.jsonl", "model", "validation", "checkpoints", ".lock"}
    assert {path.name for path in scored.folder.iterdir()} == names
    config = json.loads((scored.folder / "config.json").read_text())
    assert {name: config[name] for name in FLAGS} == FLAGS
    assert config["train_dtype"] == "float64" and config["packages"]["torch"] == torch.__version__


def test_the_validation_rows_are_blocks_of_the_validation_split(scored: Run, data: Path) -> None:
    rows = pd.read_parquet(scored.folder / "validation" / "rows.parquet")
    assert len(rows) == M == rows.sample_id.nunique()
    for row in rows.itertuples():
        want = tokens_of(data, "val", row.domain, row.block, T)
        assert row.tokens.tolist() == want.tolist()
        assert row.text == get_tokenizer("gpt2_bytes").decode(want.tolist())
    tokens = np.stack(rows.tokens.tolist()).astype("<u2")
    metadata = open_scores(scored.folder / "grad_dotprods").schema.metadata
    assert metadata[b"validation_sha256"].decode() == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert json.loads(metadata[b"run_configuration"])["seed"] == 5


def test_metrics_have_one_line_per_step_and_per_evaluation(scored: Run) -> None:
    metrics = scored.metrics()
    assert metrics.step.tolist() == list(range(STEPS))
    assert metrics.time.is_monotonic_increasing
    assert (metrics.tokens_per_second > 0).all()
    assert [record["step"] for record in scored.evaluations()] == [7, 15, 19]
    for record in scored.evaluations():
        assert record.keys() == {"step", "time", "loss/train", "loss/val", "loss/test"}
    assert len(scored.records()) == STEPS + 3


def test_dot_product_statistics_are_those_of_the_scores(scored: Run) -> None:
    steps = scored.scores().groupby("step").dot_product
    metrics = scored.metrics().set_index("step")
    for name in ("mean", "min", "max"):
        assert np.allclose(metrics[f"dot_product/{name}"], getattr(steps, name)(), rtol=1e-12)
    values = scored.scores().groupby("step")
    assert np.allclose(metrics["validation_rows/predicted_fall"], values.value.sum(), rtol=1e-12)
    assert np.allclose(metrics["validation_rows/loss"], values.val_loss.first(), rtol=1e-12)
    domains = scored.scores().groupby(["step", "domain"]).dot_product.mean().unstack()
    assert set(domains) == set(DOMAINS)
    for domain in DOMAINS:
        assert np.allclose(
            metrics[f"dot_product/domain/{domain}"], domains[domain], rtol=1e-12, equal_nan=True
        )


def test_every_step_and_sample_has_a_score(scored: Run) -> None:
    scores = scored.scores()
    assert scores.step.tolist() == [step for step in range(STEPS) for _ in range(N)]
    assert scores[["dot_product", "value", "train_loss"]].notna().all(axis=None)
    assert scores.sample_id.nunique() == STEPS * N  # less than an epoch: none comes twice
    assert (scores.sample_id == scores.domain.map(DOMAINS.index) * 2**40 + scores.block).all()


def test_value_is_the_predicted_fall_of_the_validation_loss(scored: Run) -> None:
    scores, metrics = scored.scores(), scored.metrics().set_index("step")
    factor = (metrics.lr * metrics.clip_factor / N).loc[scores.step].to_numpy()
    assert np.allclose(scores.value, factor * scores.dot_product, rtol=1e-12, atol=0)
    assert metrics.clip_factor.between(0.01, 0.99).sum() > 3, "clipping was not put to the test"
    assert np.allclose(metrics.clip_factor, np.minimum(1, 1 / metrics.grad_norm), rtol=1e-5)


def test_the_first_step_is_what_one_backward_pass_per_sample_finds(scored: Run, data: Path) -> None:
    """The tokens are those that sample ids and validation rows name, read from the shards' own bytes."""
    scores = scored.scores().query("step == 0")
    rows = pd.read_parquet(scored.folder / "validation" / "rows.parquet")
    tokens = [tokens_of(data, "train", row.domain, row.block, T) for row in scores.itertuples()]
    tokens += [tokens_of(data, "val", row.domain, row.block, T) for row in rows.itertuples()]
    joint = torch.stack(tokens)
    truth = per_sample(scored.initial.hf, hf_logits, joint[:, :-1], joint[:, 1:], N)
    assert np.allclose(scores.train_loss, truth.losses[:N], rtol=1e-12)
    assert np.allclose(scores.val_loss, truth.losses[N:].mean(), rtol=1e-12)
    assert truth.dot_error(torch.tensor(scores.dot_product.to_numpy())) < 1e-10
    norm = torch.cat([gradient.flatten() for gradient in truth.training_gradient().values()]).norm()
    assert scored.metrics().grad_norm[0] == pytest.approx(norm.item(), rel=1e-10)


def test_the_saved_model_is_the_trained_one(scored: Run, data: Path) -> None:
    saved = GPT2LMHeadModel.from_pretrained(scored.folder / "model")
    assert saved.lm_head.weight is saved.transformer.wte.weight and len(saved.lm_head.weight) == 50304
    x = tokens_of(data, "test", "Alpha", 0, T)[None, :-1]
    with torch.no_grad():
        logits = saved(x).logits
        assert torch.allclose(logits, hf_logits(scored.model.hf, x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(logits, hf_logits(scored.initial.hf, x), atol=1e-3)


def test_the_table_names_the_most_and_the_least_helpful_samples(scored: Run, data: Path) -> None:
    sums = scored.scores().groupby(["domain", "block"]).value.sum().sort_values(ascending=False)
    highest, lowest = scored.out.split("highest")[1].split("lowest")
    for (domain, block), line in zip(sums.index[:3], highest.splitlines()[1:], strict=False):
        assert f"{sums[domain, block]:+.3e}  {domain}, block {block}" in line
        words = first_words(
            get_tokenizer("gpt2_bytes").decode(tokens_of(data, "train", domain, block, T).tolist())
        )
        assert words in line
    for (domain, block), line in zip(sums.index[-3:], lowest.splitlines()[1:4], strict=True):
        assert f"{sums[domain, block]:+.3e}  {domain}, block {block}" in line
    assert lowest.splitlines()[5].startswith("no step was audited (--audit_interval 0, or")
    last = scored.evaluations()[-1]
    for name in ("train", "val", "test"):
        assert re.search(rf"^loss on {name} +{last[f'loss/{name}']:.4f}$", scored.out, re.MULTILINE)
    assert re.search(r"^steps +20 of 20$", scored.out, re.MULTILINE)
    assert re.search(
        rf"^train loss, last step +{scored.metrics().train_loss.iloc[-1]:.4f}$", scored.out, re.MULTILINE
    )
    assert f"{scored.folder / 'grad_dotprods'}\n" in scored.out, "the path is in one piece"
    assert "\x1b" not in scored.out


def test_the_first_words_of_a_sample_cannot_steer_the_terminal() -> None:
    assert first_words("a\n\n\tb \x1b[31mred\x07 \u202eÄ 字") == "a b [31mred Ä 字"
    assert len(first_words("word " * 100)) <= 100


# ---- the same training with and without scores


def test_both_methods_train_the_same_model(scored: Run, plain: Run) -> None:
    for (name, got), want in zip(scored.model.named_parameters(), plain.model.parameters(), strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-9, name
    moved = [
        (a - b).norm() for a, b in zip(scored.model.parameters(), scored.initial.parameters(), strict=True)
    ]
    assert min(moved) > 1e-3, "20 steps of training leave no parameter where it was"


def test_the_logged_loss_is_that_of_the_train_rows_alone(scored: Run, plain: Run) -> None:
    logged = scored.metrics().train_loss
    assert np.allclose(logged, plain.metrics().train_loss, rtol=1e-10, atol=0)
    assert np.allclose(logged, scored.scores().groupby("step").train_loss.mean(), rtol=1e-12, atol=0)
    for got, want in zip(scored.evaluations(), plain.evaluations(), strict=True):
        assert got["loss/val"] == pytest.approx(want["loss/val"], rel=1e-10)


def test_regular_writes_no_scores(plain: Run) -> None:
    names = {"config.json", "metrics.jsonl", "model", "checkpoints", ".lock"}
    assert {path.name for path in plain.folder.iterdir()} == names
    assert not [name for record in plain.records() for name in record if "dot_product" in name]
    assert "loss on val" in plain.out and "dot products" not in plain.out and "highest" not in plain.out


def test_the_same_seed_is_the_same_run(scored: Run, data: Path, results: Path) -> None:
    """Also with another interval between two writes, here longer than the run."""
    flags = FLAGS | {"max_steps": 3, "dot_prod_save_interval": 100, "eval_bs": 1}
    again = start(data, results, run_name="again", **flags)
    pd.testing.assert_frame_equal(again.scores(), scored.scores().query("step < 3"), check_exact=True)
    assert again.metrics().train_loss.tolist() == scored.metrics().train_loss[:3].tolist()
    other = start(data, results, run_name="other", **flags | {"max_steps": 1, "seed": 6})
    assert not set(other.scores().sample_id) & set(again.scores().sample_id)
    first, second = (next(run.initial.parameters()) for run in (again, other))
    assert not torch.equal(first, second)


# ---- evaluation


class Spy:
    """Stands in for training_loop.evaluate: notes the model and the batches of every evaluation."""

    def __init__(self, folder: Path) -> None:
        self.original: Callable[..., Any] = evaluation.evaluate
        self.folder = folder
        self.batches: list[list] = []
        self.written: list[int] = []

    def __call__(self, model, data, config, *others):
        for name, module in model.named_modules():
            assert "forward" not in vars(module), f"{name} runs under the engine"
            assert not module._forward_hooks and not module._forward_pre_hooks, name
        loaders = {
            name: SimpleNamespace(batch=self.noting(loader)) for name, loader in data.evaluation.items()
        }
        self.batches.append([])
        self.written.append(self.steps_on_disk())
        return self.original(model, SimpleNamespace(evaluation=loaders), config, *others)

    def noting(self, loader):
        def batch(index: int):
            self.batches[-1].append(loader.batch(index))
            return self.batches[-1][-1]

        return batch

    def steps_on_disk(self) -> int:
        return pd.read_parquet(self.folder).step.nunique()


def test_evaluation_is_without_the_engine_and_on_the_same_batches(
    data: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(results / "spied" / "grad_dotprods")
    monkeypatch.setattr("training_loop.evaluate", spy)
    flags = {"max_steps": 6, "eval_interval": 3, "eval_bs": 5, "eval_iter": 2, "dot_prod_save_interval": 2}
    run = start(data, results, run_name="spied", **flags)
    assert run.status == 0 and len(spy.batches) == 2
    first, second = spy.batches
    assert len(first) == 3 * 2
    for one, other in zip(first, second, strict=True):
        assert one.x.shape == (5, 8) and torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    for split, batch in zip(("train", "train", "val", "val", "test", "test"), first, strict=True):
        for domain, block, x in zip(batch.domains, batch.blocks, batch.x, strict=True):
            assert x.tolist() == tokens_of(data, split, domain, block, 8)[:-1].tolist()
    assert spy.written == [2, 6], "scores are on the disk every 2 steps, and no others"
    assert run.scores().step.tolist() == [step for step in range(6) for _ in range(2)]
    trained = {tuple(row) for batch in first[:2] for row in batch.x.tolist()}
    assert len(trained) == 10, "the evaluation sees the same row again"


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What --eval_only finds."""
    found: list[dict[str, float]] = []
    evaluate = evaluation.evaluate

    def noted(*args: Any) -> dict[str, float]:
        found.append(evaluate(*args))
        return found[-1]

    monkeypatch.setattr(evaluation, "evaluate", noted)
    return found


def test_eval_only_finds_the_losses_of_the_runs_last_evaluation(
    scored: Run, data: Path, results: Path, evaluated: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    before = tree(results)
    with caplog.at_level(logging.INFO):
        again = start(data, results, run_name="scored", eval_only=True, **FLAGS)
    assert again.status == 0 and again.out == "" and tree(results) == before
    last = scored.evaluations()[-1]
    assert list(evaluated[0]) == ["train", "val", "test"]
    for name, loss in evaluated[0].items():
        assert loss == pytest.approx(last[f"loss/{name}"], rel=1e-12)
        assert f"loss on {name}: {loss:.4f}" in caplog.text


def test_eval_only_without_a_name_evaluates_the_untrained_model(
    data: Path, tmp_path: Path, evaluated: list[dict]
) -> None:
    results = tmp_path / "results"
    assert start(data, results, eval_only=True).status == 0
    assert not results.exists()
    assert all(abs(loss - math.log(50304)) < 0.5 for loss in evaluated[0].values())


# ---- other ways to train


@pytest.mark.parametrize(("grad_clip", "clipped"), [(0.0, False), (0.5, True), (1000.0, False)])
def test_the_values_of_an_sgd_step_are_the_fall_of_the_validation_loss(
    grad_clip: float, clipped: bool, data: Path, results: Path
) -> None:
    """For plain gradient descent the prediction is exact to first order in the learning rate."""
    run = start(
        data, results, run_name=f"sgd {grad_clip}", optimizer="SGD", weight_decay=0, grad_clip=grad_clip,
        learning_rate=1e-6, max_steps=1, model_dtype="float64", batch_size=N, val_batch_size=M,
    )  # fmt: skip
    rows = pd.read_parquet(run.folder / "validation" / "rows.parquet")
    tokens = torch.stack([tokens_of(data, "val", row.domain, row.block, 8) for row in rows.itertuples()])
    with torch.no_grad():
        before, after = (model(tokens[:, :-1], tokens[:, 1:]).mean() for model in (run.initial, run.model))
    assert run.scores().value.sum() == pytest.approx((before - after).item(), rel=1e-3)
    factor = run.metrics().clip_factor[0]
    assert factor < 0.5 if clipped else factor == 1


def test_chosen_domains_sgd_and_a_log_of_every_second_step(data: Path, results: Path) -> None:
    run = start(
        data, results, run_name="chosen", domains="Beta [b]", optimizer="SGD", log_interval=2,
        train_dtype="bfloat16", contraction="gram", learning_rate=0.1,
    )  # fmt: skip
    assert run.status == 0
    assert set(run.scores().domain) == {"Beta [b]"}
    assert [record["step"] for record in run.records() if "train_loss" in record] == [1, 3]
    lr = run.scores().query("step == 3").lr.iloc[0]
    assert 0 < lr < 0.1


def test_weighted_domains_and_texts_that_look_like_markup(
    data: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    domains = "Alpha:1e-9,Beta [b]:1"
    run = start(data, results, run_name="weighted", domains=domains, block_size=64, batch_size=4, max_steps=2)
    assert set(run.scores().domain) == {"Beta [b]"}
    for row in run.scores().sort_values("value").iloc[[0, -1]].itertuples():
        text = get_tokenizer("gpt2_bytes").decode(
            tokens_of(data, "train", row.domain, row.block, 64).tolist()
        )
        assert first_words(text) in run.out
    assert "[bold]" in run.out and ":tada:" in run.out


@pytest.mark.parametrize(("granularity", "length"), [("pairwise", M), ("per_layer", 2 * 6 + 4), ("token", T)])
def test_parts_of_the_scores(granularity: str, length: int, scored: Run, data: Path, results: Path) -> None:
    """For each validation row, layer or position: in their mean, or sum, the scores of the other run."""
    flags = FLAGS | {"max_steps": 2, "score_granularity": granularity}
    run = start(data, results, run_name=granularity, **flags)
    scores, want = run.scores(), scored.scores().query("step < 2")
    parts = np.stack(scores[granularity].tolist())
    assert parts.shape == (2 * N, length)
    joined = parts.mean(1) if granularity == "pairwise" else parts.sum(1)
    assert np.allclose(joined, want.dot_product, rtol=1e-10, atol=0)
    assert np.allclose(scores.value, want.value, rtol=1e-10, atol=0)
    assert np.allclose(run.metrics()["dot_product/max"], scored.metrics()["dot_product/max"][:2], rtol=1e-10)
    values.main([str(run.folder)])  # the tools open it


def test_the_direction_of_adamw(scored: Run, data: Path, results: Path) -> None:
    """The same training, without scores in the first step."""
    flags = FLAGS | {"direction": "auto", "lr_decay_steps": STEPS}
    run = start(data, results, run_name="adamw", **(flags | {"max_steps": 4}))
    assert run.status == 0
    same = ["train_loss", "grad_norm", "validation_rows/loss"]
    assert np.allclose(run.metrics()[same], scored.metrics()[same][:4], rtol=1e-10, atol=0)
    scores = run.scores()
    assert scores.value.isna().equals(scores.step == 0) and scores.dot_product.isna().equals(scores.step == 0)
    plain = scored.scores().query("0 < step < 4")
    ratios = scores.query("step > 0").dot_product.to_numpy() / plain.dot_product.to_numpy()
    assert ratios.max() > 2 * ratios.min(), "the preconditioner is not a number"


def test_activation_checkpointing_changes_nothing(scored: Run, data: Path, results: Path) -> None:
    flags = FLAGS | {"max_steps": 2, "activation_checkpointing": True}
    run = start(data, results, run_name="checkpointing", **flags)
    want = scored.scores().query("step < 2").dot_product
    assert np.allclose(run.scores().dot_product, want, rtol=1e-12, atol=0)


def test_what_float16_cannot_hold_is_skipped_and_has_no_score(
    data: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**18))
    run = start(data, results, run_name="float16", train_dtype="float16", max_steps=8)
    assert run.status == 0
    scores, metrics = run.scores(), run.metrics().set_index("step")
    skipped = scores[scores.value.isna()].step.unique().tolist()
    assert 0 < len(skipped) < 8 and skipped == list(range(len(skipped)))
    assert scores.dot_product.isna().equals(scores.value.isna())
    assert scores.train_loss.notna().all()
    assert metrics.grad_norm.isna().equals(pd.Series(metrics.index.isin(skipped), index=metrics.index))
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert pq.read_table(run.folder / "grad_dotprods").column("value").null_count == 2 * len(skipped)


def test_parameters_in_bfloat16(data: Path, results: Path) -> None:
    run = start(data, results, run_name="bfloat16", model_dtype="bfloat16")
    assert run.status == 0
    assert run.scores().value.notna().all()
    assert GPT2LMHeadModel.from_pretrained(run.folder / "model").dtype == torch.bfloat16


TWO_PARTS = """
import sys, main, pyarrow
assert pyarrow.default_memory_pool().backend_name == "system"  # whose memory does not grow with merges
flags = sys.argv[1:]
sys.exit(main.main(flags) or main.main([*flags, "--resume", "--max_steps", "3"]))
"""


def test_weights_and_biases_offline(data: Path, tmp_path: Path) -> None:
    """Each part of a run has a folder of its own there, under one id."""
    flags = command(
        data, tmp_path, run_name="a", wandb_mode="offline", wandb_project="tests", max_steps=2,
        lr_decay_steps=3,
    )  # fmt: skip
    done = subprocess.run(
        python("-c", TWO_PARTS, *flags),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    parts = list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    names = ["train_loss", "lr", "tokens_per_second", "dot_product/mean", "loss/val", "dot_product/domain/"]
    for part in parts:
        content = part.read_bytes()
        assert [name for name in names if name.encode() not in content] == []
        assert b"tests" in content and b"lr_decay_steps" in content
        assert part.parent.name.endswith("-" + (tmp_path / "a" / "wandb_id").read_text())
