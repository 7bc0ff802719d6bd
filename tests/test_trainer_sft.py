"""TRL's SFTTrainer with scores: LoRA, rows that are packed, and rows without padding."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from scored_trainers import TOKENS, exact_loss, model
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from examples.instructions import instructions
from ghostEngines.integrations.transformers import scored

TRAIN, VALIDATION = instructions(14, seed=0), instructions(3, seed=1)
LORA = {"peft_config": LoraConfig(r=2, lora_dropout=0.0, target_modules=["c_attn", "c_proj"])}
# The ways in which samples become rows: padded, one row without padding, packed.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded-lora": ({}, LORA),
    "without-padding": ({"padding_free": True, "max_length": None}, {}),
    "packed-in-parts": ({"packing": True, "max_length": 8, "packing_strategy": "bfd_split"}, {}),
    "packed": ({"packing": True, "max_length": 24, "shuffle_dataset": True}, {}),
}


def sft(folder: Path, way: str, plain: bool = False, **more: Any) -> Any:
    options, own = WAYS[way]
    given: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "completion_only_loss": False,
        "save_strategy": "no",
    }
    arguments = SFTConfig(**given | options | more)
    if not plain:
        own = own | {
            "score_against": VALIDATION,
            "scores": folder / "run",
            "sample_id": "number",
            "group": "kind",
        }
    return (SFTTrainer if plain else scored(SFTTrainer))(
        model=model(), args=arguments, train_dataset=TRAIN, processing_class=TOKENS, **own
    )


@pytest.mark.parametrize("way", WAYS)
def test_training_is_what_it_was(way: str, tmp_path: Path) -> None:
    """TRL's fused head computes in float32."""
    plain, mine = sft(tmp_path / "plain", way, plain=True), sft(tmp_path, way)
    plain.train()
    mine.train()
    for (name, got), want in zip(mine.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), name
    for mine_logged, other in zip(mine.state.log_history, plain.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert (key in mine_logged) == (key in other)
            if key in other:
                assert mine_logged[key] == pytest.approx(other[key], rel=1e-4), key
    table = pd.read_parquet(tmp_path / "run" / "grad_dotprods")
    assert set(table["sample_id"]) == set(TRAIN["number"])
    assert way == "packed-in-parts" or len(table) == len(TRAIN)
    assert table["domain"].tolist() == [TRAIN[number]["kind"] for number in table["sample_id"]]
    samples = pd.read_parquet(tmp_path / "run" / "samples").set_index("sample_id")["text"]
    assert all(TRAIN[number]["completion"].strip() in samples[number] for number in samples.index)


def gradient(of: nn.Module, row: dict[str, Any]) -> Tensor:
    ids = torch.tensor([TOKENS(row["prompt"] + row["completion"] + TOKENS.eos_token)["input_ids"]])
    loss = exact_loss(of(input_ids=ids).logits, ids)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(of.parameters()))])


@pytest.mark.parametrize("way", ["without-padding", "packed"])
def test_each_document_of_a_row_has_the_score_of_its_own_backward_pass(way: str, tmp_path: Path) -> None:
    mine, twin = sft(tmp_path, way, optim="sgd", max_steps=1), model()
    mine.train()
    table = pd.read_parquet(tmp_path / "run" / "grad_dotprods")
    assert len(table) >= 4
    validation = torch.stack([gradient(twin, row) for row in VALIDATION]).mean(0)
    gradients = torch.stack([gradient(twin, TRAIN[number]) for number in table["sample_id"]])
    error = torch.tensor(table["dot_product"].to_numpy()) - gradients @ validation
    assert (error.abs() / (gradients.norm(dim=1) * validation.norm())).max() < 1e-10
    assert table["row_weight"].sum() == pytest.approx(1, rel=1e-6)
