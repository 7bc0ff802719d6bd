"""Every family of models in whole runs: scores, what is saved, resuming, several processes, compiled blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import Run, TwoProcesses, start, tokens_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.kill_and_resume import differences
from benchmarks.oracle import per_sample
from models.pythia import pythia_config

M, T = 2, 8
FLAGS: dict[str, Any] = {
    "model_dtype": "float64", "max_steps": 2, "batch_size": 4, "val_batch_size": M, "block_size": T,
    "checkpoint_interval": 1, "eval_interval": 1, "eval_bs": 2, "lr_decay_steps": 2, "keep_checkpoints": 3,
}  # fmt: skip


def save_pythia(folder: Path) -> None:
    """Attention and MLP side by side, a quarter of each head rotated, a head of its own."""
    pythia_config({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}).save_pretrained(
        folder
    )
    GPTNeoXForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def save_llama(folder: Path) -> None:
    """Two query heads to a key head, and GPT-2's vocabulary, which the shards of these tests need."""
    config = LlamaConfig(
        vocab_size=50304, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def save_qwen3(folder: Path) -> None:
    """A model that no file of models/ knows, with tied embeddings and dropout in its configuration."""
    config = Qwen3Config(
        vocab_size=50304, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        attention_dropout=0.1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


SAVERS = {"Pythia": save_pythia, "Llama": save_llama, "Qwen3": save_qwen3}  # GPT-2 has tests of its own


@pytest.fixture(scope="module", params=SAVERS)
def flags(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The flags of a run of one family."""
    name: str = request.param
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("models") / name
    SAVERS[name](folder)
    return FLAGS | {"architecture": "auto", "init_from": folder}


@pytest.fixture(scope="module")
def folder(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(flags: dict[str, Any], data: Path, folder: Path) -> Run:
    run = start(data, folder, run_name="a", **flags)
    assert run.status == 0, run.err
    return run


def assert_same(run: Run, want: Run, tolerance: float = 1e-10) -> None:
    assert run.status == 0, run.err
    mine, other = (each.scores().sort_values(["step", "sample_id"]) for each in (run, want))
    assert mine.sample_id.tolist() == other.sample_id.tolist()
    for column in ("dot_product", "train_loss", "value"):
        got, seen = mine[column].to_numpy(), other[column].to_numpy()
        assert np.abs(got - seen).max() <= tolerance * np.abs(seen).max(), column
    models = [AutoModelForCausalLM.from_pretrained(each.folder / "model") for each in (run, want)]
    for got, seen in zip(*(model.parameters() for model in models), strict=True):
        assert (got - seen).norm() <= tolerance * seen.norm()


def test_scores_are_exact_in_a_run(alone: Run, data: Path, folder: Path, flags: dict[str, Any]) -> None:
    """Of the second step, with the weights of the checkpoint before it and Hugging Face's own model."""
    rows = alone.scores().query("step == 1")
    validation = pd.read_parquet(alone.folder / "validation" / "rows.parquet")
    tokens = [tokens_of(data, "train", row.domain, row.block, T) for row in rows.itertuples()]
    tokens += [tokens_of(data, "val", row.domain, row.block, T) for row in validation.itertuples()]
    joint, n = torch.stack(tokens), len(rows)
    model = AutoModelForCausalLM.from_pretrained(alone.folder / "checkpoints" / "step_000001")
    assert model.dtype == torch.float64
    truth = per_sample(model, lambda model, x: model(x).logits, joint[:, :-1], joint[:, 1:], n)
    assert truth.dot_error(torch.tensor(rows.dot_product.to_numpy())) < 1e-10
    np.testing.assert_allclose(rows.train_loss, truth.losses[:n], rtol=1e-12)


def test_what_is_saved_gives_the_losses_of_the_run(
    alone: Run, data: Path, folder: Path, flags: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    flags = {name: value for name, value in flags.items() if name != "init_from"}
    with caplog.at_level("INFO"):
        assert start(data, folder, run_name="a", eval_only=True, **flags).status == 0
    assert f"{alone.evaluations()[-1]['loss/val']:.4f}" in caplog.text


@pytest.mark.parametrize("flags", ["Pythia", "Llama"], indirect=True)
def test_resuming_is_never_having_stopped(
    alone: Run, data: Path, flags: dict[str, Any], tmp_path: Path
) -> None:
    half = start(data, tmp_path, run_name="a", **flags | {"max_steps": 1})
    assert half.status == 0
    run = start(data, tmp_path, run_name="a", resume=True, **flags)
    assert run.status == 0, run.err
    assert differences(run.folder, alone.folder) == []


@pytest.mark.parametrize("parallel", ["fsdp"])
def test_two_processes_are_one(
    parallel: str, alone: Run, data: Path, flags: dict[str, Any], tmp_path: Path
) -> None:
    run = TwoProcesses(
        data, tmp_path, run_name="two", **flags | {"batch_size": 2, "parallel": parallel}
    ).ended()
    assert_same(run, alone)


@pytest.mark.usefixtures("compiled_eagerly")
@pytest.mark.parametrize(
    "flags", ["Pythia", "Qwen3"], indirect=True
)  # Llama's blocks are Qwen3's without two norms
def test_compiled_blocks(alone: Run, data: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    assert_same(start(data, tmp_path, run_name="compiled", **flags | {"compile": True}), alone)


def test_activations_computed_twice(alone: Run, data: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    run = start(data, tmp_path, run_name="twice", **flags | {"activation_checkpointing": True})
    assert_same(run, alone)
