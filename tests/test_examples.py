"""The examples, each in a smaller size, and what comes of their runs."""

import html
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from trl import SFTConfig, SFTTrainer

from attribution import ScoredRun, read_run
from attribution.curate.command import main as curate
from attribution.values_folder import Values
from examples import nanogpt, plain_loop, trainer_sft
from examples.instructions import tokenizer

SFT_ROWS = 48


def shown(run: ScoredRun) -> list[dict[str, Any]]:
    """The most helpful and the most harmful sample, after checking that the report has their texts."""
    page = html.unescape((run.folder / "report.html").read_text())
    best, worst = (
        table.to_pylist()[0] for table in Values.open(run.folder / "values").extremes("samples", 1)
    )
    for row in (best, worst):
        assert run.samples().excerpt(row["domain"], row["block"], 100).text.strip() in page
    assert run.validation_rows()["text"][0].as_py().strip() in page
    return [best, worst]


def test_nanogpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences, as the validation rows have them, help most; audited steps have exact values."""
    means = nanogpt.main(tmp_path / "run", steps=60)
    assert max(means, key=means.__getitem__) == "sentences" and len(means) == 3
    run = read_run(tmp_path / "run")
    best, worst = shown(run)
    assert best["domain"] == "sentences" and best["value"] > worst["value"]
    table = run.scores().to_table().to_pandas()
    audited = table.dropna(subset="exact_value")
    assert set(audited.step) == {1, 4, 9, 19, 39, 49, 59} and len(audited) == 7 * nanogpt.ROWS
    late = audited[audited.step > 30]
    assert np.corrcoef(late.exact_value, late.value)[0, 1] > 0.8
    assert "validation loss" in capsys.readouterr().out


def test_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of each update add up to 1, also in the short ones; wrong labels harm."""
    assert plain_loop.main(tmp_path / "run") >= 5
    assert "most harmful\n" in capsys.readouterr().out
    table = read_run(tmp_path / "run").scores().to_table().to_pandas()
    of_updates = table.groupby("step")
    np.testing.assert_allclose(of_updates.row_weight.sum(), 1, rtol=1e-5)
    sizes = of_updates.size()
    assert sizes.tolist() == of_updates.global_batch_size.first().tolist()
    assert sizes.min() < plain_loop.ROWS * plain_loop.MICRO_BATCHES == sizes.max()


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> ScoredRun:
    folder = tmp_path_factory.mktemp("sft") / "run"
    trainer_sft.main(folder, rows=SFT_ROWS, epochs=2)
    return read_run(folder)


def test_sft_has_a_report(sft: ScoredRun) -> None:
    best, _ = shown(sft)
    assert best["value"] > 0
    page = (sft.folder / "report.html").read_text()
    assert "coloured by target" in page and page.count('nats">it</span>') + page.count('nats"> it</span>') > 5
    assert not re.search(r'title="[^"]*">( ?what| ?\?)</span>', page), "a prompt has no values"
    assert sft.scores().count_rows() == 2 * SFT_ROWS


def test_sft_is_curated_and_trained_on(sft: ScoredRun, tmp_path: Path) -> None:
    window = ["--steps", f"{SFT_ROWS // 16}:"]  # without the first epoch, as the example's own values
    curate([str(sft.folder), *window, "--drop", "bottom:0.25", "--output", str(tmp_path / "new")])
    files, cache = str(tmp_path / "new" / "data" / "*.parquet"), str(tmp_path / "cache")
    kept = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    values = Values.open(sft.folder / "values").read("samples").sort_by("value")["sample_id"].to_pylist()
    assert sorted(kept["id"]) == sorted(values[SFT_ROWS // 4 :])
    assert all(" it is " in text for text in kept["text"])
    words = tokenizer()
    trainer = SFTTrainer(
        model=trainer_sft.llama(len(words)),
        args=SFTConfig(
            output_dir=str(tmp_path / "checkpoints"),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=kept.select_columns(["text"]),
        processing_class=words,
    )
    trained = trainer.train()
    assert trained.global_step == -(-len(kept) // 8) and np.isfinite(trained.training_loss)
