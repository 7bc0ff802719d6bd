"""LLaVA in whole runs: exact scores of image-text rows, what is saved and resumed, and the tools on such a run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from run_helpers import Run, TwoProcesses, start
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from attribution.curate.command import main as curate
from attribution.curate.curated_records import describe_domains
from attribution.curate.drop_rule import Choice
from attribution.errors import AttributionError
from attribution.query.command import main as query
from attribution.report.command import write_report
from attribution.scored_run import ScoredRun
from attribution.values import write_values
from benchmarks.kill_and_resume import differences
from benchmarks.oracle import per_loss, row_loss
from config_file import TrainingConfig, resolve
from data_processing.llava_demo import draw_image
from dataloader import open_datasets
from foundation.errors import ConfigError
from llava_dataloader import LlavaDataset, image_processor
from models.llava import SIZES, llava_config

M, T = 2, 104
FLAGS: dict[str, Any] = {
    "architecture": "auto", "model_dtype": "float64", "max_steps": 2, "batch_size": 4, "val_batch_size": M,
    "block_size": T, "checkpoint_interval": 1, "eval_interval": 1, "eval_bs": 2, "lr_decay_steps": 2,
    "keep_checkpoints": 3, "score_granularity": "pairwise", "learning_rate": 1e-3, "warmup_step": 0,
}  # fmt: skip
COLOURS, SHAPES = ("red", "blue"), ("square", "circle")


def record(number: int, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "image": image, "conversations": turns}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training records of four groups, four validation and four test records."""
    folder = tmp_path_factory.mktemp("llava") / "data"
    number = 0
    for split, rounds in (("train", 3), ("val", 1), ("test", 1)):
        found = []
        for colour in COLOURS:
            for shape in SHAPES:
                for _ in range(rounds):
                    image = f"{colour}_{shape}/{number:03d}.png"
                    path = folder / "images" / image
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draw_image(colour, shape, random.Random(number)).save(path)
                    found.append(record(number, image, "What is it?", f"A {colour} {shape}."))
                    number += 1
        (folder / f"{split}.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def flags(records: Path) -> dict[str, Any]:
    """LLaVA-Tiny with a narrower language model, from a folder."""
    size = SIZES["LLaVA-Tiny"]
    text = size["text_config"] | {"hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(6)
    folder = records.with_name("model")
    LlavaForConditionalGeneration(llava_config(size | {"text_config": text})).save_pretrained(folder)
    return FLAGS | {"llava_data_dir": records, "init_from": folder}


@pytest.fixture(scope="module")
def alone(data: Path, results: Path, flags: dict[str, Any]) -> Run:
    run = start(data, results, run_name="llava", **flags)
    assert run.status == 0, run.err
    return run


def dataset(records: Path, split: str, **given: Any) -> LlavaDataset:
    config = TrainingConfig(
        architecture="LLaVA-Tiny", device="cpu", block_size=T, llava_data_dir=str(records), **given
    )
    found = open_datasets(resolve(config, {}), config.selections())[0][split]
    assert isinstance(found, LlavaDataset)
    return found


def rows_of(blocks: LlavaDataset, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    by_number = {each.number: each for each in blocks.records()}
    rows = [blocks.encode(by_number[number]) for number in numbers]
    images = torch.stack([blocks.image(by_number[number]) for number in numbers])
    return *(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)), images  # type: ignore[return-value]


def test_scores_are_exact(alone: Run, records: Path) -> None:
    """Of the second step: Hugging Face's own model, one backward pass for each row and its image."""
    scores = alone.scores().query("step == 1")
    validation = pd.read_parquet(alone.folder / "validation" / "rows.parquet")
    train = rows_of(dataset(records, "train"), scores.block.tolist())
    val = rows_of(dataset(records, "val"), validation.block.tolist())
    x, y, images = (torch.cat(pair) for pair in zip(train, val, strict=True))
    model = AutoModelForImageTextToText.from_pretrained(alone.folder / "checkpoints" / "step_000001")
    assert model.dtype == torch.float64
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)

    def loss(i: int) -> Tensor:
        logits = model(input_ids=x[i : i + 1], pixel_values=images[i : i + 1].double()).logits
        return row_loss(logits[0], y[i])

    truth = per_loss(model, loss, len(x), len(scores))
    assert truth.dot_error(torch.tensor(scores.dot_product.to_numpy())) < 1e-10
    np.testing.assert_allclose(np.stack(scores.pairwise.tolist()), truth.pairwise().numpy(), rtol=1e-9)
    np.testing.assert_allclose(scores.train_loss, truth.losses[: len(scores)], rtol=1e-10)


def test_the_vision_tower_is_frozen_and_the_rest_trains(
    alone: Run, data: Path, flags: Any, tmp_path: Path
) -> None:
    first = start(data, tmp_path, run_name="first", train_only="projector", **flags)
    assert first.status == 0, first.err
    before = AutoModelForImageTextToText.from_pretrained(flags["init_from"], dtype=torch.float64)
    for run, trained in ((alone, ("multi_modal_projector", "language_model", "lm_head")),
                         (first, ("multi_modal_projector",))):  # fmt: skip
        after = AutoModelForImageTextToText.from_pretrained(run.folder / "model")
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            assert torch.equal(old, new) != any(part in name for part in trained), name


def test_resuming_is_never_having_stopped(alone: Run, data: Path, flags: Any, tmp_path: Path) -> None:
    assert start(data, tmp_path, run_name="llava", **flags | {"max_steps": 1}).status == 0
    run = start(data, tmp_path, run_name="llava", resume=True, **flags)
    assert run.status == 0, run.err
    assert differences(run.folder, alone.folder) == []


def assert_same_scores(run: Run, want: Run) -> None:
    assert run.status == 0, run.err
    mine, other = (each.scores().sort_values(["step", "sample_id"]) for each in (run, want))
    assert mine.sample_id.tolist() == other.sample_id.tolist()
    np.testing.assert_allclose(mine.dot_product, other.dot_product, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("parallel", ["fsdp"])
def test_two_processes_are_one(parallel: str, alone: Run, data: Path, flags: Any, tmp_path: Path) -> None:
    run = TwoProcesses(
        data, tmp_path, run_name="two", **flags | {"batch_size": 2, "parallel": parallel}
    ).ended()
    assert_same_scores(run, alone)


@pytest.mark.usefixtures("compiled_eagerly")
def test_compiled_blocks(alone: Run, data: Path, flags: Any, tmp_path: Path) -> None:
    assert_same_scores(start(data, tmp_path, run_name="compiled", **flags | {"compile": True}), alone)


def test_values_and_a_report_with_pictures(alone: Run, tmp_path: Path) -> None:
    run = ScoredRun.open(alone.folder)
    values = write_values([run], tmp_path / "values")
    scores = alone.scores().groupby("sample_id").value.sum()
    table = values.read("samples").to_pandas().set_index("sample_id")
    np.testing.assert_allclose(table.value, scores[table.index], rtol=1e-12)
    assert set(table.domain) <= {f"{colour}_{shape}" for colour in COLOURS for shape in SHAPES}
    assert values.read("documents").num_rows == 0
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') >= M + 3
    assert "answer: A red" in page and 'id="documents"' not in page


def test_samples_are_found_by_text_place_and_validation_row(
    alone: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    query([str(alone.folder), "--text", "A red square"])
    out = capsys.readouterr().out
    assert out.startswith("3 training samples contain the text\n") and out.count("red_square, block ") == 3
    query([str(alone.folder), "--sample", "blue_circle:10"])
    out = capsys.readouterr().out
    assert out.startswith("blue_circle, block 10\nquestion: What is it? answer: A blue circle.\n")
    assert "images/blue_circle/010.png" in out
    query([str(alone.folder), "--validation", "1"])
    assert "samples that helped it most" in capsys.readouterr().out
    for asked, message in (
        (["--text", "A green"], "none of the 12 training samples contains it"),
        (["--sample", "green:1"], "there is no group 'green'; there are blue_circle, "),
        (["--sample", "blue_circle:1"], "there is no sample 1 in group 'blue_circle'"),
    ):
        with pytest.raises(AttributionError, match=message):
            query([str(alone.folder), *asked])


def test_records_of_low_value_are_left_out(
    alone: Run, data: Path, records: Path, flags: Any, tmp_path: Path
) -> None:
    curate([str(alone.folder), "--drop", "bottom:0.5", "--output", str(tmp_path / "new")])
    values = alone.scores().groupby("sample_id").value.sum().sort_values()
    gone = {number & (1 << 40) - 1 for number in values.index[: len(values) // 2]}
    old, new = (json.loads((each / "train.json").read_text()) for each in (records, tmp_path / "new"))
    assert new == [each for number, each in enumerate(old) if number not in gone]
    assert (tmp_path / "new" / "val.json").read_bytes() == (records / "val.json").read_bytes()
    again = start(data, tmp_path, run_name="again", **flags | {"llava_data_dir": tmp_path / "new"})
    assert again.status == 0, again.err
    with pytest.raises(AttributionError, match="its samples have no documents in them; take --unit samples"):
        curate(
            [str(alone.folder), "--drop", "negative", "--unit", "documents", "--output", str(tmp_path / "b")]
        )


Damage = Callable[[Path], object]


def with_record(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / "train.json").read_text())
        edit(found[5])
        (folder / "train.json").write_text(json.dumps(found))

    return damage


def truncated(folder: Path) -> None:
    path = next((folder / "images" / "red_circle").glob("005.png"))
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_record(lambda record: record.pop("image")), "record 5 ('r5'): "),
        (with_record(lambda record: record["conversations"][1].update({"from": "bot"})), "'bot'"),
        (
            with_record(lambda record: record["conversations"][1].update(value="long " * 99)),
            "--block_size 104 takes",
        ),
        (truncated, "005.png"),
    ],
    ids=["no image", "role", "too long", "truncated"],
)
def test_a_bad_record_is_an_error_or_skipped(
    damage: Damage, message: str, records: Path, data: Path, flags: Any, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = shutil.copytree(records, tmp_path / "data")
    damage(folder)
    run = start(data, tmp_path, run_name="a", **flags | {"llava_data_dir": folder, "max_steps": 4})
    assert run.status == 2 and message in run.err.splitlines()[-1], run.err
    with caplog.at_level("WARNING"):
        left = dataset(folder, "train", on_bad_record="skip").records()
    assert "train.json: 1 records are skipped: record 5: " in caplog.text
    assert sorted(record.number for record in left) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_images_are_resized_cropped_and_normalised(tmp_path: Path) -> None:
    """As CLIP's images: by its means and deviations, or by those that the model's folder names."""
    path = tmp_path / "grey.png"
    Image.new("RGB", (64, 96), (51, 102, 153)).save(path)
    means, deviations = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({
            "image_processor_type": "CLIPImageProcessor", "image_mean": [0, 0, 0], "image_std": [1, 1, 1],
            "size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48},
        })
    )  # fmt: skip
    for folder, mean, deviation in ((None, means, deviations), (tmp_path, (0, 0, 0), (1, 1, 1))):
        with Image.open(path) as image:
            (got,) = image_processor(folder, 48)(image, return_tensors="np")["pixel_values"]
        want = [(value - m) / d for value, m, d in zip((0.2, 0.4, 0.6), mean, deviation, strict=True)]
        assert got.shape == (3, 48, 48)
        np.testing.assert_allclose(got, np.broadcast_to(np.reshape(want, (3, 1, 1)), got.shape), atol=1e-5)
    with pytest.raises(ConfigError, match="makes images of \\(48, 48\\), and the model takes 32 x 32"):
        image_processor(tmp_path, 32)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    with pytest.raises(ConfigError, match="images for SiglipImageProcessor are not made here"):
        image_processor(tmp_path, 48)


def test_domains_of_images_without_a_folder_are_those_of_the_run() -> None:
    records = [{"image": "1.jpg"}, {"image": "a/2.jpg"}, {"image": 3}, "no record"]
    choice = Choice({"train": 1}, {"train": 1}, {}, "", None, None)
    found = describe_domains(records, choice, "train")
    assert {name: (each["units"], each["state"]) for name, each in found.items()} == {
        "a": (1, "unchanged"), "train": (1, "left out"),
    }  # fmt: skip
