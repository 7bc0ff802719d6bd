"""Hugging Face's Trainer with scores: training is what it was, and scores are those of its rows."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import concatenate_datasets
from run_helpers import environment
from scored_trainers import (
    COLLATOR,
    TOKENS,
    TRAIN,
    VALIDATION,
    exact_loss,
    model,
    train,
    train_with_and_without_scores,
    trainer,
)
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Trainer
from trl import DPOTrainer

from attribution.values import main as values
from benchmarks.launch import fork, world_of
from foundation.errors import UserError
from ghostEngines import AttachError, Scoring, verify
from ghostEngines.integrations.transformers import scored

Parameters = dict[str, Tensor]


def parameters(of: Trainer) -> Parameters:
    return {name: p.detach().clone() for name, p in of.model.named_parameters()}


def distance(mine: Parameters, other: Parameters) -> float:
    return max(((mine[name] - p).norm() / p.norm()).item() for name, p in other.items())


def scores(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "run" / "grad_dotprods")


def logged(of: Trainer) -> list[dict[str, float]]:
    return [
        {k: v for k, v in each.items() if "runtime" not in k and "per_second" not in k}
        for each in of.state.log_history
    ]


@pytest.mark.parametrize(
    ("side", "options"),
    [
        ("right", {}),
        ("left", {"gradient_checkpointing": True, "average_tokens_across_devices": False}),
        ("right", {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1, "eval_strategy": "epoch"}),
    ],
)
def test_training_is_what_it_was(side: str, options: dict[str, Any], tmp_path: Path) -> None:
    COLLATOR.tokenizer.padding_side = side
    plain = trainer(tmp_path / "plain", plain=True, **options)
    plain.train()
    mine = trainer(tmp_path, **options)
    mine.train()
    assert distance(parameters(mine), parameters(plain)) < 1e-9
    for got, want in zip(logged(mine), logged(plain), strict=True):
        assert got == pytest.approx(want, rel=1e-6)
    assert mine.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-9)
    assert mine.predict(VALIDATION).predictions.shape[0] == len(VALIDATION)
    table = scores(tmp_path)
    assert Counter(table["sample_id"]) == dict.fromkeys(TRAIN["number"], 2)
    assert dict(zip(table["sample_id"], table["domain"], strict=True)) == dict(
        zip(TRAIN["number"], TRAIN["kind"], strict=True)
    )


def test_bfloat16_is_as_near_as_rows_in_another_order(tmp_path: Path) -> None:
    """Rounding differs with the batch: compared with a plain run whose updates' rows are in other micro-batches."""
    COLLATOR.tokenizer.padding_side = "right"
    rows = TRAIN.select(range(20))
    moved = rows.select([first + place for first in range(0, 20, 4) for place in (0, 3, 2, 1)])
    found = []
    for name, options in {
        "plain": {"plain": True, "with_train_dataset": rows},
        "moved": {"plain": True, "with_train_dataset": moved},
        "scored": {"with_train_dataset": rows},
    }.items():
        of = trainer(
            tmp_path / name,
            bf16=True,
            train_sampling_strategy="sequential",
            with_model=model(torch.float32),
            **options,
        )
        of.train()
        found.append(parameters(of))
    plain, other, mine = found
    assert 0 < distance(mine, plain) < distance(other, plain)
    assert scores(tmp_path / "scored")["exact_value"].notna().any()


def test_a_plain_loss_that_is_divided_later_and_the_best_model(tmp_path: Path) -> None:
    """With accepts_loss_kwargs=False each micro-batch has a mean of its own, divided by their number."""
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    found = []
    for name in ("plain", "scored"):
        own = model()
        own.accepts_loss_kwargs = False
        of = trainer(tmp_path / name, with_model=own, plain=name == "plain", **options)
        of.train()
        found.append(of)
    assert distance(parameters(found[1]), parameters(found[0])) < 1e-9
    assert logged(found[1])[0] == pytest.approx(logged(found[0])[0], rel=1e-6)
    for _, own in scores(tmp_path / "scored").groupby("step"):
        assert own["row_weight"].sum() == pytest.approx(1, rel=1e-12)


def test_verify_takes_a_trainer(tmp_path: Path) -> None:
    report = verify(trainer(tmp_path))
    assert report.exact and report.rows == 2 + len(VALIDATION)
    with pytest.raises(UserError, match="give a batch, or a scored Trainer; got a Trainer alone"):
        verify(trainer(tmp_path, plain=True))


def gradient(of: nn.Module, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A row's loss and its gradient, alone and without padding."""
    ids = torch.tensor([row["input_ids"]])
    loss = exact_loss(of(input_ids=ids).logits, ids)
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(of.parameters()))])


def test_scores_are_those_of_one_backward_pass_a_row(tmp_path: Path) -> None:
    """The first steps, of SGD with clipping; each value is that of the row's part in the update."""
    steps = 3
    mine = trainer(tmp_path, max_steps=steps, optim="sgd", with_scoring=Scoring(every_exact=True))
    mine.train()
    table, twin = scores(tmp_path), model()
    for step, own in table.groupby("step"):
        rows = [TRAIN[number] for number in own["sample_id"]]
        validation = torch.stack([gradient(twin, row)[1] for row in VALIDATION]).mean(0)
        losses, gradients = map(torch.stack, zip(*(gradient(twin, row) for row in rows), strict=True))
        dots = gradients @ validation
        lengths = torch.tensor([len(row["input_ids"]) for row in rows]).double()
        weights = (lengths - 1) / lengths.sum()  # the Trainer counts position 0 of GPT-2, too, as a target
        update = weights @ gradients
        factor = min(1.0, 0.5 / (update.norm().item() + 1e-6))
        lr = own["lr"].iloc[0]
        norms = gradients.norm(dim=1) * validation.norm()
        assert ((torch.tensor(own["dot_product"].to_numpy()) - dots).abs() / norms).max() < 1e-10, step
        assert own["row_weight"].tolist() == pytest.approx(weights.tolist(), rel=1e-12)
        assert own["clip_factor"].iloc[0] == pytest.approx(factor, rel=1e-9)
        assert own["train_loss"].tolist() == pytest.approx(losses.tolist(), rel=1e-10)
        in_pass = lr * factor * weights * dots
        got = own["lr"] * own["clip_factor"] * own["row_weight"] * own["dot_product"]
        assert got.tolist() == pytest.approx(in_pass.tolist(), rel=1e-9)
        with torch.no_grad():
            start = 0
            for p in twin.parameters():
                p -= lr * factor * update[start : start + p.numel()].view_as(p)
                start += p.numel()
        after = torch.stack([gradient(twin, row)[1] for row in VALIDATION]).mean(0)
        assert own["of_batch"].iloc[0] == pytest.approx(
            (lr * factor * update @ (validation + after) / 2).item(), rel=1e-8
        )
        assert own["exact_value"].sum() == pytest.approx(own["of_batch"].iloc[0], rel=1e-6)


def in_processes(
    action: Callable[..., int], folder: Path, *arguments: object, processes: int = 1
) -> list[int | None]:
    """Run a function of scored_trainers in new processes and return their exit statuses."""
    store, worlds = world_of(processes)
    running = [
        fork(
            action,
            folder,
            *arguments,
            output=folder.parent / f"{folder.name}-{rank}",
            environment=environment(folder.parent) | (world if processes > 1 else {}),
        )
        for rank, world in enumerate(worlds)
    ]
    for each in running:
        each.join(120)
    del store
    return [each.exitcode for each in running]


@pytest.mark.parametrize("scoring", [Scoring(refresh_interval=3), Scoring(lookahead=True, audit_interval=5)])
def test_validation_rows_in_passes_of_their_own(scoring: Scoring, tmp_path: Path) -> None:
    """The training is the same, and a run that resumes goes on with the gradient that it had."""
    once: dict[str, Any] = {"num_train_epochs": 1}
    plain = trainer(tmp_path / "plain", plain=True, **once)
    whole = trainer(tmp_path, with_scoring=scoring, **once)
    plain.train()
    whole.train()
    assert distance(parameters(whole), parameters(plain)) < 1e-9
    want = scores(tmp_path)
    resumed = trainer(tmp_path, with_scoring=scoring, **once)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    got = scores(tmp_path)
    pd.testing.assert_frame_equal(got, want, rtol=1e-12)
    assert got["dot_product"][got["step"] > 0].notna().all()


def test_a_killed_run_goes_on_without_a_row_doubled_or_lost(tmp_path: Path) -> None:
    whole, killed = trainer(tmp_path / "whole"), tmp_path / "killed"
    whole.train()
    assert in_processes(train, killed, 6) == [-9]  # after the checkpoint of step 4
    resumed = trainer(killed)
    resumed.train(resume_from_checkpoint=True)
    assert distance(parameters(resumed), parameters(whole)) < 1e-12
    got, want = (
        scores(folder).sort_values(["step", "sample_id"], ignore_index=True)
        for folder in (killed, tmp_path / "whole")
    )
    pd.testing.assert_frame_equal(got, want, rtol=1e-12)
    values([str(killed / "run")])
    samples = pd.read_parquet(killed / "run" / "samples")
    assert sorted(samples["sample_id"]) == TRAIN["number"][:]
    assert TOKENS.decode(TRAIN[0]["input_ids"]) in set(samples["text"])


def test_two_processes_score_what_one_does(tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    statuses = in_processes(train_with_and_without_scores, two, processes=2)
    assert statuses == [0, 0], (tmp_path / "two-0.err").read_text()[-3000:]
    assert distance(torch.load(two / "scored.pt"), torch.load(two / "plain.pt")) < 1e-9
    table = scores(two / "scored")
    assert set(table["sample_id"]) == set(TRAIN["number"]) and set(table["rank"]) == {0, 1}
    whole = 0
    for _, own in table.groupby("step"):
        assert len(own) == own["global_batch_size"].iloc[0]
        if own["exact_value"].notna().all():
            whole += 1
            assert own["exact_value"].sum() == pytest.approx(own["of_batch"].iloc[0], rel=1e-4)
    assert whole > 0


class Passing(Trainer):
    """A subclass as many are: with arguments of its own, and a loss that it scales as transformers documents it."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum())
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_subclass_with_its_own_arguments_and_scale(tmp_path: Path) -> None:
    found = []
    for plain in (True, False):
        of = trainer(tmp_path / str(plain), Passing, plain=plain, with_extra=3, optim="sgd")
        of.train()
        assert of.extra == 3
        found.append(parameters(of))
    assert distance(found[1], found[0]) < 1e-9


def test_rows_without_a_target_weigh_nothing(tmp_path: Path) -> None:
    """Also a micro-batch of one such row alone."""
    masked = TRAIN.map(lambda row: {"labels": [-100] * len(row["input_ids"])}).select(range(2))
    rest = TRAIN.map(lambda row: {"labels": row["input_ids"]}).select(range(2, 6))
    rows = concatenate_datasets([rest, masked]).select([0, 4, 1, 2, 5, 3])
    rows = rows.select_columns(["number", "kind", "input_ids", "labels"])
    collator = DataCollatorForSeq2Seq(TOKENS)
    found = []
    for plain in (True, False):
        of = trainer(
            tmp_path / str(plain),
            plain=plain,
            with_train_dataset=rows,
            with_data_collator=collator,
            with_eval_dataset=rows,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            **({} if plain else {"with_score_against": rest}),
        )
        of.train()
        found.append(parameters(of))
    assert distance(found[1], found[0]) < 1e-9
    table = scores(tmp_path / "False").set_index("sample_id")
    nothing = table.loc[masked["number"][:]]
    assert (nothing["row_weight"] == 0).all() and nothing["dot_product"].isna().all()
    assert (nothing["value"][nothing["step"] > 0] == 0).all()
    values([str(tmp_path / "False" / "run")])


@pytest.mark.parametrize(
    "term",
    [
        lambda of, outputs: 5e-7 * sum(p.pow(2).sum() for p in of.model.parameters()),
        lambda of, outputs: 0.3 * (outputs.logits.mean() - outputs.logits.mean().detach()),
    ],
)
def test_a_term_is_seen_however_small_it_is(term: Callable[[Any, Any], Tensor], tmp_path: Path) -> None:
    class More(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss, outputs = super().compute_loss(*args, **options | {"return_outputs": True})
            return loss + term(self, outputs)

    with pytest.raises(UserError, match="it has another term"):
        trainer(tmp_path, More).train()


def test_a_collator_in_another_order_and_a_model_with_dropout(tmp_path: Path) -> None:
    def by_length(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = COLLATOR(sorted(features, key=lambda each: -len(each["input_ids"])))
        return batch

    with pytest.raises(UserError, match="the collator changes the order of the rows"):
        trainer(tmp_path, with_data_collator=by_length, per_device_train_batch_size=4).train()
    shutil.rmtree(tmp_path / "run")
    dropping = model()
    dropping.transformer.h[1].mlp.dropout.p = 0.1
    with pytest.raises(AttachError, match="dropout"):
        trainer(tmp_path, with_model=dropping).train()
    assert not (tmp_path / "run").exists()  # so that the next one can have its name
    trainer(tmp_path, max_steps=1).train()
    with pytest.raises(UserError, match=r"go on with it by train\(resume_from_checkpoint"):
        trainer(tmp_path, max_steps=1).train()


@pytest.mark.parametrize(
    ("scoring", "granularity", "column", "whole"),
    [
        (Scoring(every_exact=True, by_target=True), "total", "target_value", "exact_value"),
        (Scoring(), "token", "token", "dot_product"),
    ],
)
def test_scores_by_word(scoring: Scoring, granularity: str, column: str, whole: str, tmp_path: Path) -> None:
    """Rows of different length; the parts are those of the sample's tokens, which the report can colour."""
    COLLATOR.tokenizer.padding_side = "right"
    mine = trainer(tmp_path, with_scoring=scoring, with_granularity=granularity)
    mine.train()
    table = scores(tmp_path).dropna(subset=whole)
    assert table[column].map(sum).tolist() == pytest.approx(table[whole].tolist(), rel=1e-9)
    values([str(tmp_path / "run")])
    words = pd.read_parquet(tmp_path / "run" / "values" / "words.parquet").set_index("sample_id")
    for number, parts in words["parts"].items():
        length = len(TRAIN[number]["input_ids"])
        assert len(parts) >= length and not any(parts[length:])
    texts = pd.read_parquet(tmp_path / "run" / "samples")
    for text, metadata in zip(texts["text"], texts["metadata"], strict=True):
        assert "".join(json.loads(metadata)["pieces"]) == text
    COLLATOR.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="padded on the right"):
        trainer(tmp_path / "left", with_scoring=scoring, with_granularity=granularity).train()
    COLLATOR.tokenizer.padding_side = "right"


def test_what_is_refused(tmp_path: Path) -> None:
    class Other(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 1.5

    twice = TRAIN.map(lambda row: {"number": row["number"] // 2})
    refused: list[tuple[dict[str, Any], str]] = [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"with_compute_loss_func": exact_loss}, "compute_loss_func"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant",
        ),
        ({"with_processing_class": None}, "processing_class"),
        ({"with_train_dataset": TRAIN.to_iterable_dataset(), "max_steps": 1}, "without a length"),
        ({"with_train_dataset": TRAIN.rename_column("wrong", "ghost_row")}, "has a column 'ghost_row'"),
        ({"with_train_dataset": twice}, "the id 0 is 2 times in column 'number'"),
        ({"with_sample_id": "kind"}, "are not integers"),
        ({"with_group": "colour"}, "no column 'colour'; it has number, kind"),
        ({"with_score_against": VALIDATION.select([])}, "score_against is empty"),
    ]
    for options, message in refused:
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, **options)
    with pytest.raises(UserError, match="a subclass of transformers"):
        scored(int)
    with pytest.raises(UserError, match="of TRL's that is SFTTrainer alone, and not DPOTrainer"):
        scored(DPOTrainer)
    with pytest.raises(
        ValueError, match=r"the loss that compute_loss\(\) of the Trainer's class returns is not"
    ):
        trainer(tmp_path / "other", Other).train()
