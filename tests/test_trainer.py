"""Hugging Face's Trainer with scores: training is what it was, and scores are those of its rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from run_helpers import environment
from scored_trainers import COLLATOR, TOKENS, TRAIN, VALIDATION, exact_loss, model, train, trainer
from torch import Tensor, nn
from transformers import Trainer

from attribution.values import main as values
from benchmarks.launch import fork, world_of
from foundation.errors import UserError
from ghostEngines import AttachError
from ghostEngines.integrations.transformers import scored
from ghostEngines.scoring import Scoring

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


def in_processes(folder: Path, *arguments: object, processes: int = 1) -> list[int | None]:
    """Run scored_trainers.train in new processes and return their exit statuses."""
    store, worlds = world_of(processes)
    running = [
        fork(
            train,
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


def test_a_killed_run_goes_on_without_a_row_doubled_or_lost(tmp_path: Path) -> None:
    whole, killed = trainer(tmp_path / "whole"), tmp_path / "killed"
    whole.train()
    assert in_processes(killed, 6) == [-9]  # after the checkpoint of step 4
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
    statuses = in_processes(tmp_path / "two", processes=2)
    assert statuses == [0, 0], (tmp_path / "two-0.err").read_text()[-3000:]
    table = scores(tmp_path / "two")
    assert set(table["sample_id"]) == set(TRAIN["number"]) and set(table["rank"]) == {0, 1}
    whole = 0
    for _, own in table.groupby("step"):
        assert len(own) == own["global_batch_size"].iloc[0]
        if own["exact_value"].notna().all():
            whole += 1
            assert own["exact_value"].sum() == pytest.approx(own["of_batch"].iloc[0], rel=1e-4)
    assert whole > 0


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
        ({"with_train_dataset": TRAIN.to_iterable_dataset()}, "without a length"),
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
    with pytest.raises(ValueError, match=r"the loss that compute_loss\(\) of the Trainer's class returns is not"):
        trainer(tmp_path / "other", Other).train()
    dropping = model()
    dropping.transformer.h[1].mlp.dropout.p = 0.1
    with pytest.raises(AttachError, match="dropout"):
        trainer(tmp_path / "dropout", with_model=dropping).train()
