"""The blocks of docs/loops.md, run as they stand with a small model and its data."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from scored_trainers import TOKENS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaForCausalLM
from trl import SFTConfig

from attribution import read_run
from attribution.values import write_values
from examples.instructions import instructions
from examples.trainer_sft import llama
from ghostEngines import per_sample_losses

ROOT = Path(__file__).parent.parent
VOCABULARY, T, ROWS, N, M = 32, 5, 12, 3, 2


def blocks(heading: str, page: str = "docs/loops.md") -> str:
    """The Python of a section."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


def tokens(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, T + 1), generator=torch.Generator().manual_seed(seed))


TRAIN, VALIDATION = tokens(ROWS, 0), tokens(M, 1)


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate keeps the settings of a process's first Accelerator for all later ones, accumulation too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page calls the reader's own, in an empty folder, and what its loops share."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, VOCABULARY))
    data = TensorDataset(torch.arange(ROWS), TRAIN[:, :-1], TRAIN[:, 1:])
    found: dict[str, Any] = {
        "__name__": "loops",
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loader": DataLoader(data, batch_size=N),
        "val_x": VALIDATION[:, :-1],
        "val_y": VALIDATION[:, 1:],
        "decode": lambda ids: " ".join(map(str, ids)),
    }
    exec(blocks("What the loops share"), found)
    return found


def scores(name: str) -> pd.DataFrame:
    """The scores of a run, once its values were computed."""
    run = read_run(Path("results", name))
    assert len(write_values([run], run.folder / "values").read("samples")) == ROWS
    text = run.samples().excerpt("all", 3, 100).text
    assert text == " ".join(map(str, TRAIN[3].tolist()))
    return run.scores().to_table().to_pandas().sort_values(["step", "sample_id"], ignore_index=True)


def plain(names: dict[str, Any]) -> tuple[pd.DataFrame, nn.Module]:
    """The scores and the model of the page's plain loop."""
    own = names | {"model": copy.deepcopy(names["model"])}
    own["optimizer"] = torch.optim.AdamW(own["model"].parameters(), lr=1e-3)
    exec(blocks("A plain loop"), own)
    return scores("plain"), own["model"]


def check_same(found: tuple[pd.DataFrame, nn.Module], want: tuple[pd.DataFrame, nn.Module]) -> None:
    pd.testing.assert_frame_equal(found[0], want[0], rtol=1e-4)
    check_parameters(found[1], want[1])


def check_parameters(found: nn.Module, want: nn.Module) -> None:
    for a, b in zip(found.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_plain_loop(names: dict[str, Any]) -> None:
    """Its training is that of a loop without scores."""
    found, trained = plain(names)
    want: list[tuple[int, float]] = []
    for ids, x, y in names["loader"]:
        losses = per_sample_losses(names["model"], x, y)
        want += zip(ids.tolist(), losses.tolist(), strict=True)
        names["optimizer"].zero_grad()
        losses.mean().backward()
        names["optimizer"].step()
    assert found.sample_id.tolist() == [number for number, _ in want]
    np.testing.assert_allclose(found.train_loss, [loss for _, loss in want], rtol=1e-5)
    assert found.value.isna().tolist() == [True] * N + [False] * (ROWS - N)
    check_parameters(names["model"], trained)


def test_a_sample_has_no_padding(names: dict[str, Any]) -> None:
    """Neither does it lack its last target, whatever is masked before."""
    x = torch.tensor([[5, 6, 7, 0, 0]])
    for y in ([[6, 7, 8, -100, -100]], [[-100, -100, 8, -100, -100]]):
        for end in (3, 4, 5):
            (found,) = names["samples"](torch.tensor([9]), x[:, :end], torch.tensor(y)[:, :end])
            assert (found.sample_id, found.tokens, found.text) == (9, [5, 6, 7, 8], "5 6 7 8")


def test_accelerate(names: dict[str, Any]) -> None:
    want = plain(names)
    exec(blocks("accelerate"), names)
    check_same((scores("accelerate"), names["inner"]), want)


def test_accelerate_in_half_precision(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine sees the autocast, and exact values leave it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    want, _ = plain(names)
    seen = []
    record = names["record"]

    def audited(run: Any, engine: Any, step: int, ids: Any, x: Any, y: Any, losses: Any, *more: Any) -> None:
        exact = engine.exact_values(
            [lambda: per_sample_losses(names["inner"], x, y)],
            lambda: per_sample_losses(names["inner"], names["val_x"], names["val_y"]),
            clip_factor=1.0,
            global_rows=len(ids),
        )
        seen.append((exact.measured, exact.predicted, engine._current.gradients_autocast))
        record(run, engine, step, ids, x, y, losses, *more)

    names["record"] = audited
    exec(blocks("accelerate"), names)
    assert [dtype for *_, dtype in seen] == [torch.bfloat16] * len(seen)
    for measured, predicted, _ in seen:
        assert predicted == pytest.approx(measured, rel=0.05)
    found = scores("accelerate")
    assert not np.allclose(found.train_loss, want.train_loss, rtol=1e-5, atol=0)
    np.testing.assert_allclose(found.train_loss, want.train_loss, rtol=0.02)


def test_lightning(names: dict[str, Any]) -> None:
    want = plain(names)
    exec(blocks("Lightning"), names)
    untrained = copy.deepcopy(names["model"])

    def fit(module: Any) -> None:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, names["loader"])

    fit(names["Scored"](names["model"]))
    check_same((scores("lightning"), names["model"]), want)

    class Broken(names["Scored"]):  # type: ignore[misc, name-defined, valid-type]
        def training_step(self, batch: Any, number: int) -> None:
            if number == 2:
                raise RuntimeError("no more")
            super().training_step(batch, number)

    Path("results", "lightning").rename("first")
    with pytest.raises(RuntimeError, match="no more"):
        fit(Broken(untrained))
    left = read_run("results/lightning").scores().to_table().to_pandas()
    assert sorted(left.step.unique()) == [0, 1], "what was in the buffer is on the disk"


@pytest.mark.parametrize(
    ("heading", "page"),
    [("Hugging Face's Trainer, and TRL's", "docs/loops.md"), ("In any loop", "README.md")],
)
def test_trl(names: dict[str, Any], heading: str, page: str) -> None:
    model: LlamaForCausalLM = llama(len(TOKENS))
    names |= {
        "model": model,
        "args": SFTConfig(
            output_dir="checkpoints",
            per_device_train_batch_size=4,
            max_steps=3,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        "dataset": instructions(ROWS, seed=0),
        "tokenizer": TOKENS,
        "validation_dataset": instructions(2, seed=1),
    }
    exec(blocks(heading, page), names)
    table = read_run("results/sft").scores().to_table().to_pandas()
    assert table.sample_id.nunique() == ROWS and table.value.notna().sum() == ROWS - 4
