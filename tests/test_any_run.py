"""Runs that a loop of one's own writes with score_store.write_run: from their scores to what the tools make of them."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copy
from threading import Barrier
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attribution import AttributionError, read_run
from attribution.curate.command import main as curate
from attribution.options import run_command
from attribution.query.command import main as query
from attribution.report.command import main as report
from attribution.values import main as values
from attribution.values import write_values
from foundation.errors import UserError
from ghostEngines import GradDotProdEngine, per_sample_losses
from score_store import ExactRows, Processes, RunWriter, Sample, ScoreError, write_run
from score_store.samples import SCHEMA, SampleWriter, open_samples

ROOT = Path(__file__).parent.parent
T, M, N, STEPS, LR = (
    6,
    2,
    2,
    4,
    0.1,
)  # positions; validation rows; train rows of a process; steps; learning rate
GROUPS = ("prose", "it's code", "ünïcode [1]")
# Ids are the loop's own: large, negative, and with nothing to read from their bits.
IDS = [3, 1 << 50, -7, 12, 13, 14, 1 << 40 | 5, 2]


def sample(number: int) -> Sample:
    text = f"text {number:02d} of the loop"
    tokens = list(text.encode()[: T + 1])
    about = {"source": f"page {number}", "score": number / 2, "tags": ["a", number]}
    return Sample(IDS[number], text, tokens, GROUPS[number % 3], about if number else {"source": None})


SAMPLES = [sample(number) for number in range(len(IDS))]
VALIDATION = [Sample(row, f"validation {row}", [70 + row] * (T + 1)) for row in range(M)]
SETTINGS: dict[str, Any] = {
    "optimizer": "SGD", "direction": "gradient", "validation": VALIDATION, "granularity": "pairwise"
}  # fmt: skip


def open_both(folder: Path, **options: Any) -> list[RunWriter]:
    """The writers of two processes, which are threads here."""
    barrier = Barrier(2)

    def opened(rank: int) -> RunWriter:
        return write_run(folder, processes=Processes(rank, barrier.wait), **SETTINGS, **options)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(opened, (0, 1)))


def batch(step: int, rank: int) -> list[Sample]:
    """Every sample comes several times, and some of a process's are the other one's in another step."""
    return [SAMPLES[(step * 3 + rank * N + row) % len(SAMPLES)] for row in range(N)]


def tokens_of(rows: Sequence[Sample]) -> Tensor:
    return torch.tensor([row.tokens for row in rows])


class Loop:
    """Two processes with one model; `table` has what each row's value must be.

    The weights of a step's rows are 1/6, 1/6, 1/3, 1/3, so that the training loss is not the rows' mean.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(128, 4), nn.Linear(4, 128)).double()
        self.writers = open_both(folder, **options)
        self.table: list[dict[str, Any]] = []

    def gradient(self, tokens: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(self.model(tokens[:-1]), tokens[1:])
        return torch.cat(
            [each.ravel() for each in torch.autograd.grad(losses, list(self.model.parameters()))]
        )

    def step(self, step: int) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        for rank, run in enumerate(self.writers):
            rows, weight = batch(step, rank), (rank + 1) / 6
            engine = GradDotProdEngine(self.model, val_batch_size=M, granularity="pairwise")
            engine.attach(optimizer)
            tokens = tokens_of([*rows, *VALIDATION])
            losses = per_sample_losses(self.model, tokens[:, :-1], tokens[:, 1:])
            engine.joint_loss(losses).backward()
            engine.prepare_gradients()
            run.samples.append(rows)
            run.append(
                step=step,
                sample_ids=[row.sample_id for row in rows],
                groups=[row.group for row in rows],
                dot_products=engine.dot_products(),
                train_losses=losses[:N].detach(),
                val_loss=losses[N:].detach().mean(),
                lr=LR,
                clip_factor=0.5,
                global_batch_size=2 * N,
                row_weights=torch.full((N,), weight),
            )
            engine.detach()
            optimizer.zero_grad()
            by_hand = [self.gradient(row) for row in tokens_of(VALIDATION)]
            for row in rows:
                own = self.gradient(torch.tensor(row.tokens))
                each = [LR * 0.5 * weight * float(own @ one) for one in by_hand]
                self.table.append(
                    {
                        "step": step,
                        "id": row.sample_id,
                        "value": sum(each) / M,
                        "row 1": each[1],
                        "group": row.group,
                    }
                )

    def close(self) -> pd.DataFrame:
        for run in self.writers:
            run.close()
        return pd.DataFrame(self.table)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("own") / "mine"
    loop = Loop(folder, settings={"seed": 3})
    for step in range(STEPS):
        loop.step(step)
    return folder, loop.close()


def test_values_are_the_sums_by_hand(
    mine: tuple[Path, pd.DataFrame], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = mine
    values([str(folder)])
    out = capsys.readouterr().out
    assert "text 0" in out and "sample 1" in out and "no step was audited" in out, out
    found = pd.read_parquet(folder / "values" / "samples.parquet").set_index("sample_id")
    want = table.groupby("id").agg({"value": "sum", "group": "first", "step": ["size", "min", "max"]})
    assert found.index.tolist() == sorted(want.index) and set(found.index) == set(IDS)
    np.testing.assert_allclose(found.value, want["value", "sum"], rtol=1e-6)  # weights are float32
    assert (
        found.domain.tolist() == want["group", "first"].tolist()
        and found.block.tolist() == found.index.tolist()
    )
    for name, own in (("steps", "size"), ("first_step", "min"), ("last_step", "max")):
        assert found[name].tolist() == want["step", own].tolist()
    of_groups = pd.read_parquet(folder / "values" / "domains.parquet").set_index("domain").value
    np.testing.assert_allclose(
        of_groups.sort_index(), table.groupby("group").value.sum().sort_index(), rtol=1e-6
    )
    assert pd.read_parquet(folder / "values" / "documents.parquet").empty
    scores = read_run(folder).scores().to_table().to_pandas()
    np.testing.assert_allclose(scores.groupby("step").row_weight.sum(), 1, rtol=1e-6)


def test_what_is_written_is_read_in_a_few_lines(mine: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    run = read_run(mine[0])
    assert run.scores().count_rows() == 2 * N * STEPS
    assert run.samples().excerpt(GROUPS[1], IDS[1], 100).text == SAMPLES[1].text
    best = write_values([run], tmp_path / "values").extremes("samples", 1)[0].to_pylist()[0]
    assert best["sample_id"] == mine[1].groupby("id").value.sum().idxmax()


def test_report_and_queries(
    mine: tuple[Path, pd.DataFrame], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = mine
    report([str(folder), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    for words in (
        "text 01 of the loop",
        "validation 1",
        "each a row of the loop’s own data",
        "ünïcode [1]",
        "sample&nbsp;12",
    ):
        assert words in page, words
    assert "2 texts of the validation data" in page and 'id="documents"' not in page
    capsys.readouterr()
    query([str(folder), "--text", "text 0"])
    assert capsys.readouterr().out.startswith(f"{len(IDS)} training samples contain the text\n")
    query([str(folder), "--sample", f"{GROUPS[2]}:-7"])
    out = capsys.readouterr().out
    value = table[table.id == -7].value.sum()
    assert out.startswith(
        f"{GROUPS[2]}, sample -7\ntext 02 of the loop\nvalue {value:+.3e} in steps 0 to 3, rank "
    )
    query([str(folder), "--validation", "1"])
    out = capsys.readouterr().out
    best = table.groupby("id")["row 1"].sum()
    assert f"{best.max():+.3e}" in out and out.startswith("validation row 1: all, sample 1\nvalidation 1\n")
    for asked, message in (
        (["--sample", "prose:4"], "there is no sample 4 in group 'prose' of .*, which has 8; a loop puts"),
        (["--sample", "prose:-7"], r"there is no sample -7 in group 'prose' of .*: it is of 'ünïcode \[1\]'"),
        (["--sample", "prose"], "give DOMAIN:SAMPLE, as in 'prose:3'"),
        (["--text", "nowhere"], "none of the 8 training samples contains it"),
    ):
        with pytest.raises(AttributionError, match=message):
            query([str(folder), *asked])


def test_what_is_kept_is_a_data_set(
    mine: tuple[Path, pd.DataFrame],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, table = mine
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    elsewhere = tmp_path_factory.mktemp("a[1]*")
    curate([str(folder), "--drop", "bottom:0.5", "--output", str(elsewhere / "data" / "curated")])
    out = capsys.readouterr().out
    assert "rows that training never used are not in it" in out
    line = out.partition("to train on it: ")[2].strip()
    loaded = eval(line, {"datasets": datasets})
    texts = {each.sample_id: each.text for each in SAMPLES}
    assert len(loaded) == len(IDS) // 2 and all(texts[row["id"]] == row["text"] for row in loaded)
    monkeypatch.chdir(tmp_path_factory.mktemp("plain"))
    (elsewhere / "data").rename("data")  # `datasets` takes a name of its folder for a pattern
    lines = [part.partition("```")[0] for part in documented().split("```python\n")[3:5]]
    columns = [{"number": number, "mine": str(number)} for number in [*IDS, 77]]  # the run never used 77
    found: dict[str, Any] = {"dataset": datasets.Dataset.from_list(columns)}
    exec(lines[0], found)
    assert set(found["mine"]["number"]) == set(loaded["id"]) and found["mine"].column_names == [*columns[0]]
    exec(lines[1], found)
    assert set(found["mine"]["number"]) == {*loaded["id"], 77}

    monkeypatch.chdir(tmp_path)
    curate([str(folder), "--drop", "bottom:0.5", "--output", str(tmp_path / "new")])
    order = table.groupby("id").value.sum().sort_values().index
    kept = pd.read_parquet(tmp_path / "new" / "data")
    assert sorted(kept["id"]) == sorted(order[len(IDS) // 2 :])
    assert list(kept.columns) == ["id", "group", "text", "tokens", "score", "source", "tags"]
    for row in kept.itertuples():
        number = IDS.index(row.id)
        own = SAMPLES[number]
        assert (row.text, row.group, list(row.tokens)) == (own.text, own.group, own.tokens)
        if number:
            assert (row.source, row.score, json.loads(row.tags)) == tuple(
                own.metadata[name] for name in ("source", "score", "tags")
            )
    manifest = json.loads((tmp_path / "new" / "curation.json").read_text())
    assert {name: row["units"] for name, row in manifest["domains"].items()} == dict(
        zip(GROUPS, (3, 3, 2), strict=True)
    )
    assert sum(row["dropped"] for row in manifest["domains"].values()) == len(IDS) // 2
    for rule, unit, message in (
        ("bottom:1", "samples", "no sample would be left"),
        ("negative", "documents", "no documents in them"),
    ):
        with pytest.raises(AttributionError, match=message):
            curate([str(folder), "--drop", rule, "--unit", unit, "--output", str(tmp_path / "none")])
        assert [path.name for path in tmp_path.iterdir()] == ["new"], "whole or not at all"


def test_metadata_that_no_column_holds(tmp_path: Path) -> None:
    """It becomes JSON; what a column holds stays as it is."""
    numbers: dict[str, list[Any]] = {
        "huge": [1 << 63, 1], "large": [(1 << 63) - 1, -(1 << 63)], "mixed": [0.5, (1 << 53) + 1],
        "real": [0.5, 1 << 53], "negative": [-(1 << 63) - 1, None], "lists": [[1, "a"], {"b": None}], "words": ["a", 1],
        "truth": [True, None], "nothing": [None, None],
    }  # fmt: skip
    with small_run(tmp_path / "run", sample_ids=[200, 201]) as run:
        run.samples.append(
            [
                Sample(200 + i, "", [1], "prose", {key: each[i] for key, each in numbers.items()})
                for i in (0, 1)
            ]
        )
    curate([str(tmp_path / "run"), "--drop", "threshold:-1", "--output", str(tmp_path / "new")])
    found = pq.read_table(next((tmp_path / "new" / "data").iterdir())).to_pydict()
    rows = [found["id"].index(number) for number in (200, 201)]
    got = {key: [found[key][row] for row in rows] for key in numbers}
    as_json = {
        "huge": [str(1 << 63), "1"], "mixed": ["0.5", str((1 << 53) + 1)], "negative": [str(-(1 << 63) - 1), None],
        "lists": ['[1, "a"]', '{"b": null}'], "words": ["a", "1"],
    }  # fmt: skip
    assert got == numbers | as_json


def test_a_killed_run_is_resumed_without_a_row_doubled_or_lost(
    mine: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    loop = Loop(folder, settings={"seed": 3})
    for step in range(3):
        loop.step(step)
        if step < 2:
            for run in loop.writers:
                run.flush()
    loop.writers[0].flush()  # of step 2, which rank 1 is not done with when both are killed
    (folder / "samples" / ".part-00001-000009.parquet.tmp").write_text("half a file")
    (folder / ".grad_dotprods.step-000000000002-000000000002.rank-00001.parquet.tmp").write_text(
        "half a file"
    )
    with pytest.raises(
        ScoreError, match=r"is there already: name another folder, remove it, or give resume_from"
    ):
        write_run(folder, **SETTINGS, settings={"seed": 3})
    with pytest.raises(ScoreError, match=r"config.json has seed 3, this run 4: it is of another run"):
        write_run(folder, **SETTINGS, settings={"seed": 4}, resume_from=2)
    with pytest.raises(
        ScoreError, match=r"scores up to step 2, so that steps 3 to 6 would be missing: resume from"
    ):
        write_run(folder, **SETTINGS, settings={"seed": 3}, resume_from=7)
    again = Loop(folder, settings={"seed": 3}, resume_from=2)
    for step in range(2, STEPS):
        again.step(step)
    again.close()
    names = ["step", "rank", "sample_id"]
    tables = [read_run(each).scores().to_table().to_pandas().sort_values(names) for each in (folder, mine[0])]
    assert (tables[0][[*names, "value"]].to_numpy() == tables[1][[*names, "value"]].to_numpy()).all()
    assert open_samples(folder / "samples").ids.tolist() == sorted(IDS)
    assert not list(folder.rglob("*.tmp"))


def test_each_sample_is_there_once_whoever_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("score_store.samples.PART_ROWS", 6)
    monkeypatch.setattr("score_store.samples.ROWS", 2)
    folder = tmp_path / "samples"
    first, second = (SampleWriter(folder, rank=rank) for rank in (0, 1))
    first.append(SAMPLES[:4])
    second.append(SAMPLES[2:5])
    first.flush()
    second.flush()  # without those that the other one wrote since
    assert [open_samples(folder).read(number)["text"] for number in IDS[:5]] == [
        each.text for each in SAMPLES[:5]
    ]
    assert sum(len(each) for each in open_samples(folder).tables()) == 5
    for each in SAMPLES:
        first.append([each, each])
        first.flush()
        second.append([each])
    first.close()
    second.close()
    rows = open_samples(folder)
    assert len(rows) == len(IDS) == sum(len(pd.read_parquet(path)) for path in folder.iterdir())
    with SampleWriter(folder, rank=2) as third:  # as after a resume
        third.append(SAMPLES)
        other = replace(SAMPLES[3], text="another text")
        message = (
            "sample id 12 is there with two contents: 'text 03 of the loop'; and 'another text'; an id must"
        )
        with pytest.raises(ScoreError, match=message):
            third.append([other])
    assert not list(folder.glob("part-00002*"))
    part = min(folder.iterdir())
    copy(
        part, part.with_name("part-00000-000099.parquet")
    )  # killed while merging: the old part is still there
    assert open_samples(folder).ids.tolist() == sorted(IDS)
    with SampleWriter(folder) as after:
        after.append(SAMPLES)
    assert sum(len(each) for each in open_samples(folder).tables()) == len(IDS)
    # Both at once: each may write it, and readers tell.
    third, fourth = (SampleWriter(tmp_path / "two", rank=rank) for rank in (0, 1))
    third.append([SAMPLES[3]])
    fourth._learn()
    third.flush()
    fourth._write(iter([table_of(SAMPLES[3])]))
    assert len(open_samples(tmp_path / "two")) == 1
    fourth._write(iter([table_of(other)]))
    with pytest.raises(ScoreError, match=message):
        open_samples(tmp_path / "two")


def table_of(row: Sample) -> pa.Table:
    return pa.Table.from_pylist([row.columns], schema=SCHEMA)


def small_run(folder: Path, granularity: Any = "total", **changes: Any) -> RunWriter:
    run = write_run(
        folder, optimizer="SGD", direction="gradient", validation=VALIDATION, granularity=granularity
    )
    run.samples.append(SAMPLES)
    append(run, **changes)
    return run


def append(run: RunWriter, **changes: Any) -> None:
    row: dict[str, Any] = {
        "step": 0, "sample_ids": np.array([3, 12]), "groups": "prose", "dot_products": torch.ones(2),
        "train_losses": torch.ones(2), "val_loss": 1.0, "lr": 0.1, "clip_factor": 1.0, "global_batch_size": 2,
    }  # fmt: skip
    run.append(**row | changes)


def tool(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one line that attribution.values prints."""
    assert run_command("attribution.values", values, [str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("attribution.values: error: ") and error.count("\n") == 1
    return error


def test_what_is_wrong_in_a_run_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_run(tmp_path / "two groups") as run:
        append(run, step=1, groups=["prose", "code"])
    assert "sample 12 has scores in two groups, 'code' and 'prose': a sample has one" in tool(
        capsys, tmp_path / "two groups"
    )
    options = {"granularity": "token", "dot_products": torch.ones(2, T)}
    with small_run(tmp_path / "left", **options) as run:
        append(run, step=1, dot_products=torch.ones(2, T + 1))
    assert "sample 3 has different numbers of parts in different steps, 6, 7, and not of padding" in tool(
        capsys, tmp_path / "left"
    )
    small_run(tmp_path / "no pieces", **options).close()
    assert run_command("attribution.values", values, [str(tmp_path / "no pieces")]) == 0
    capsys.readouterr()
    found = read_run(tmp_path / "no pieces").samples()
    assert found.pieces("prose", 3, 100) is None
    with SampleWriter(tmp_path / "no pieces" / "samples", rank=1) as writer:
        writer.append([replace(SAMPLES[0], sample_id=99, metadata={"pieces": ["text"]})])
    with pytest.raises(
        ScoreError, match="prose, sample 99 has 1 pieces of its text in its metadata, for 7 tokens"
    ):
        read_run(tmp_path / "no pieces").samples().pieces("prose", 99, 100)
    with SampleWriter(tmp_path / "no pieces" / "samples", rank=1) as writer:
        writer.append([replace(SAMPLES[0], sample_id=98, metadata={"pieces": [1] * 7})])
    with pytest.raises(
        ScoreError, match=r"98 has pieces in its metadata that are no list of strings, \[1, 1"
    ):
        read_run(tmp_path / "no pieces").samples().pieces("prose", 98, 100)
    for name, changes, message in (
        ("no text", {"sample_ids": [3, 99]}, "there is no sample 99 in group 'prose' of "),
        (
            "other group",
            {"groups": "code"},
            "sample 3 in group 'code' of .*: it is of 'prose'; a sample has one",
        ),
    ):
        small_run(tmp_path / name, **changes).close()
        assert re.search(message, tool(capsys, tmp_path / name))
        assert not (tmp_path / name / "values").exists()
        with pytest.raises(AttributionError, match=message):
            curate([str(tmp_path / name), "--drop", "negative", "--output", str(tmp_path / "none")])
    with write_run(tmp_path / "no texts", **SETTINGS | {"granularity": "total"}) as run:
        append(run)
    assert "there is no sample 3 in group 'prose' of " in tool(capsys, tmp_path / "no texts")
    assert not (tmp_path / "no texts" / "values").exists() and not (tmp_path / "none").exists()
    small_run(tmp_path / "damaged").close()
    config = tmp_path / "damaged" / "config.json"
    config.write_text(json.dumps({"method": "own loop", "run_name": "damaged"}))
    assert "config.json lacks images: another version of this program wrote it" in tool(
        capsys, tmp_path / "damaged"
    )


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", val_loss=None)
    for changes, message in (
        ({"sample_ids": np.array([0.5, 1.0])}, r"sample_ids are float64, such as \[0.5\]: give integers"),
        ({"sample_ids": np.array([1 << 63, 0], np.uint64)}, "sample_ids are uint64"),
        ({"row_weights": [0.5]}, "row_weights need one entry per sample"),
        ({"groups": ["a"]}, "need one entry per sample"),
        ({"groups": [None, "a"]}, "a group is None"),
        ({"row_weights": [-0.5, 1.5]}, "they must be numbers that are not negative"),
        ({"row_weights": [torch.nan, 1.0]}, "they must be numbers that are not negative"),
        ({"step": 2}, "step 2 is appended where step 1 comes next"),
        ({"val_loss": torch.ones(2)}, r"val_loss is of shape \(2,\): it is one number"),
        ({"null": torch.zeros(2)}, r"null is of shape \(2,\)"),
        ({"dot_products": torch.ones(2, 7)}, r"need one entry per sample each, got .*\(2, 7\)"),
        (
            {"exact": ExactRows(torch.ones(3), 1.0, 0.0, 0.0, 1.0, 1.0)},
            r"exact values of shape \(3,\) for 2 rows",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            append(run, **changes)
    for wrong in (
        Sample("3", "text", [1]),  # type: ignore[arg-type]
        Sample(3.5, "text", [1]),  # type: ignore[arg-type]
        Sample(1 << 63, "text", [1]),
        Sample(3, "\ud800", [1]),
        Sample(3, "text", [1], group=None),  # type: ignore[arg-type]
        Sample(3, "text", [-100]),
        Sample(3, "text", [1], metadata={"a": {1, 2}}),
    ):
        with pytest.raises(ScoreError, match="cannot be written"):
            run.samples.append([wrong])
    exact = ExactRows(torch.ones(2), 2.0, 0.0, 0.0, 1.0, 1.0)
    append(run, exact=exact)
    exact.values.zero_()  # the loop's own buffer
    run.close()
    written = pd.read_parquet(tmp_path / "run" / "grad_dotprods")
    assert written["exact_value"].dropna().tolist() == [1, 1]
    for options, message in (
        ({"validation": []}, "validation is empty"),
        ({"settings": {"method": "mine"}}, "settings: method is set by write_run itself"),
        ({"by_target": True}, 'by_target=True splits exact values: give values="exact", too'),
        ({"resume_from": 0}, r"there is no run to go on with \(leave out resume_from\)"),
        ({"direction": "gradiant"}, "direction is 'gradiant': there are auto, gradient"),
        ({"values": "exakt"}, "values is 'exakt': there are in_pass, exact"),
        ({"granularity": "tokens"}, "granularity 'tokens'"),
        ({"settings": {"path": Path("a")}}, "must be what JSON has"),
        ({"settings": {"rate": torch.nan}}, "must be what JSON has"),
    ):
        with pytest.raises(UserError, match=message):
            write_run(tmp_path / "other", **SETTINGS | options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for step, message in ((-1, "steps are counted from 0"), (3, "steps 1 to 2 would be missing")):
        with pytest.raises(ScoreError, match=message):
            write_run(tmp_path / "run", **SETTINGS | {"granularity": "total", "resume_from": step})
    assert len(pd.read_parquet(tmp_path / "run" / "grad_dotprods")) == len(written)  # nothing has changed


def test_a_process_that_had_not_written_its_last_step(tmp_path: Path) -> None:
    first, second = open_both(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"of shape \(2, 7\) in a run of granularity 'pairwise' with 2 of them"
    ):
        append(first, dot_products=torch.ones(2, 7))
    for step in range(2):
        for run in (first, second):
            append(run, step=step, val_loss=None, global_batch_size=4, dot_products=torch.ones(2, M))
        if step == 0:
            second.flush()
    first.close()
    with pytest.raises(ScoreError, match="scores of 2 rows in step 1, and its update had 4"):
        write_run(tmp_path / "run", **SETTINGS, resume_from=2)
    write_run(tmp_path / "run", **SETTINGS, resume_from=1).close()


def test_runs_of_a_loop_have_common_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample that only one of them used has its text there."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    samples = {
        row.sample_id: replace(
            row,
            metadata={"pieces": [*row.text[:T], row.text[T:]]}
            | ({"image": "a.png"} if row.sample_id == 3 else {}),
        )
        for row in SAMPLES
    }
    options: dict[str, Any] = {
        "optimizer": "SGD", "direction": "gradient", "validation": VALIDATION, "granularity": "token"
    }  # fmt: skip
    padded = {"a": torch.eye(T)[:2], "b": torch.eye(T + 2)[:2]}  # a batch is as long as its longest row
    for name, ids in (("a", [3, 12]), ("b", [3, 2])):
        run = write_run(tmp_path / name, **options, images=tmp_path / "pictures")
        own = [samples[number] for number in ids]
        groups = [row.group for row in own]
        append(run, sample_ids=ids, groups=groups, val_loss=None, dot_products=padded[name])
        run.samples.append(own)
        run.close()
    values([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "both")])
    out = capsys.readouterr().out
    assert all(f"text {IDS.index(number):02d} of" in out for number in (3, 12, 2))
    both = pd.read_parquet(tmp_path / "both" / "samples.parquet").set_index("sample_id").value
    np.testing.assert_allclose(both[[2, 3, 12]], [0.025, 0.05, 0.025])
    parts = pd.read_parquet(tmp_path / "both" / "words.parquet").set_index("sample_id").parts
    assert [len(parts[number]) for number in (2, 3, 12)] == [T + 2, T, T]
    np.testing.assert_allclose(parts[3], 0.05 * np.eye(T)[0])
    assert "of values by word" not in out
    report([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert (
        'title="+25.0 × 10⁻³ nats">e</span><span class="even"' in page and ">4 of the loop</span>" not in page
    )
    assert (
        page.count('<img class="thumbnail" src="data:image/png;base64,') == 1 and "<dd>not known</dd>" in page
    )
    with SampleWriter(tmp_path / "b" / "samples", rank=1) as writer:
        writer.append([replace(SAMPLES[3], text="other data")])
    with pytest.raises(ScoreError, match="sample id 12 is there with two contents"):
        values([str(tmp_path / "a"), str(tmp_path / "b")])


def documented() -> str:
    """The section of docs/values.md on loops of one's own."""
    page = (ROOT / "docs" / "values.md").read_text()
    return page.partition("## From your own loop")[2].partition("\n## ")[0]


STEP = """
        tokens = tokens_of([Sample(i, text, its_tokens) for i, text, its_tokens in batch] + rows)
        losses = per_sample_losses(model, tokens[:, :-1], tokens[:, 1:])
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()
"""


def test_the_lines_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand in docs/values.md, with a pass of the engine where they leave it out; the run is AdamW's."""
    monkeypatch.chdir(tmp_path)
    write, read = (part.partition("```")[0] for part in documented().split("```python\n")[1:3])
    before, left_out, after = write.partition("        ...  # forward")
    assert left_out
    model = nn.Sequential(nn.Embedding(128, 4), nn.Linear(4, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    engine = GradDotProdEngine(model, val_batch_size=M, direction="auto")
    engine.attach(optimizer)
    names = {
        "validation": [(row.text, row.tokens) for row in VALIDATION], "n": 4, "factor": 1.0, "engine": engine,
        "batches": [[(i, f"news {i}", list(range(i, i + T + 1))) for i in range(step, step + 4)] for step in range(3)],
        "model": model, "optimizer": optimizer, "per_sample_losses": per_sample_losses, "tokens_of": tokens_of,
    }  # fmt: skip
    exec(before + STEP + after.partition("\n")[2] + read, names)
    scores = read_run("results/mine").scores().to_table().to_pandas()
    assert scores.value.isna().tolist() == [True] * 4 + [False] * 8
    found = write_values([read_run("results/mine")], tmp_path / "again").read("samples").to_pandas()
    assert found.sample_id.tolist() == list(range(6)) and set(found.domain) == {"news"}
