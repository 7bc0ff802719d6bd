"""Values of samples, documents and domains, against pandas and a loop over tokens; and what is refused."""

import ast
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_helpers import DOMAINS, write_shards
from score_folders import T, scores_of, write_run

import attribution.documents
from attribution.audit import Audit, audit_lines, measure_audit, read_audits
from attribution.database import ScoreDatabase
from attribution.documents import write_documents
from attribution.errors import AttributionError
from attribution.options import parse_steps, run_command
from attribution.query.history import find_document_uses
from attribution.scored_run import ScoredRun, same_samples
from attribution.values import count_steps_of_half, main, write_values
from attribution.values_folder import FILES, Values, being_written
from attribution.words import whole_samples
from data_processing.blocks import BlockDataset
from data_processing.domain_lists import parse_set
from data_processing.shards import GPT2_BYTES_IDS, ShardWriter, domain_file_name, list_shards
from foundation import progress
from score_store.schema import OF_STEP
from score_store.validation_rows import Shown, save_validation_rows

NULL_STEP, ZERO_STEP = 5, 0
VALUES_PAGE = Path(__file__).parent.parent / "docs" / "values.md"
RUN_NAMES = (
    "lr=0.5",
    "domain=1",
    "*",
    "[ab]",
    "a'b",
    'a"b',
    "back\\slash",
    "_x",
    ".x",
    "s3:x",
    "%41",
    "-O2",
    "a\nb",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """Two runs, in a folder whose name must do no harm: as a pattern it means the folder of another run."""
    root = tmp_path_factory.mktemp("results")
    results = root / "lr=0.1 [a] it's"
    write_run(root / "lr=0.1 a it's" / "1", data, seed=3)
    return [
        write_run(results / f"{seed}", data, seed=seed, null_steps=[NULL_STEP], zero_steps=[ZERO_STEP])
        for seed in (1, 2)
    ]


@pytest.fixture
def damaged(tmp_path: Path, folders: list[Path]) -> Path:
    """A copy of a run, to be spoiled."""
    return Path(shutil.copytree(folders[0], tmp_path / "run"))


def values_of(tmp_path: Path, *folders: Path, **options) -> Values:
    return write_values([ScoredRun.open(folder) for folder in folders], tmp_path / "values", **options)


def weighted(table: pd.DataFrame, normalise: str) -> pd.Series:
    """Each row's value, divided as `normalise` says; 0 where there is nothing to divide by."""
    by_step = table.groupby("step").value
    divisor = {
        "none": table.value * 0 + 1,
        "absolute": by_step.transform(lambda values: values.abs().sum()),
        "predicted": by_step.transform(lambda values: abs(values.sum())),
    }[normalise]
    return (table.value / divisor).where((divisor != 0) | table.value.isna(), 0.0)


def want_samples(folders: list[Path], normalise: str, first: int, last: int) -> pd.DataFrame:
    tables = []
    for folder in folders:
        table = scores_of(folder)
        tables.append(table.assign(weighted=weighted(table, normalise)))
    rows = pd.concat(tables).query("@first <= step <= @last")
    sums = rows.groupby(["sample_id", "domain", "block"]).agg(
        value=("weighted", lambda values: values.sum(min_count=1) / len(folders)),
        steps=("weighted", "count"),
        first_step=("step", "min"),
        last_step=("step", "max"),
    )
    return sums.reset_index().sort_values("sample_id")


# ---- the numbers


@pytest.mark.parametrize("normalise", ["none", "absolute", "predicted"])
@pytest.mark.parametrize(("runs", "window"), [(1, (None, None)), (2, (None, None)), (2, (3, 9)), (1, (5, 5))])
def test_values_of_samples(
    folders: list[Path], tmp_path: Path, runs: int, window: tuple[int | None, int | None], normalise: str
) -> None:
    values = values_of(tmp_path, *folders[:runs], normalise=normalise, steps=window)
    got = values.read("samples").to_pandas()
    first, last = window
    first, last = 0 if first is None else first, 11 if last is None else last
    want = want_samples(folders[:runs], normalise, first, last)
    assert want.value.isna().any() and (runs == 1 or want.steps.max() > 1)
    pd.testing.assert_frame_equal(
        got, want, check_dtype=False, check_index_type=False, check_like=False, rtol=1e-12
    )
    assert values.manifest["normalise"] == normalise
    assert [run["steps"] for run in values.manifest["runs"]] == [[first, last]] * runs


def documents_by_token(samples: pd.DataFrame, starts: dict[str, np.ndarray]) -> pd.DataFrame:
    """A T-th of a sample's value for each of its targets, token by token; null if no sample has a value."""
    rows = []
    for sample in samples.itertuples():
        for token in range(sample.block * T + 1, (sample.block + 1) * T + 1):
            document = int((starts[sample.domain] <= token).sum()) - 1
            rows.append((sample.domain, document, sample.block, sample.value / T))
    tokens = pd.DataFrame(rows, columns=["domain", "document", "block", "value"])
    groups = tokens.groupby(["domain", "document"])
    sums = groups.value.sum(min_count=1)
    return pd.DataFrame({"value": sums, "blocks": groups.block.nunique()}).reset_index()


def document_starts(data: Path, domain: str) -> np.ndarray:
    return np.fromfile(data / "train" / f"{domain_file_name(domain)}.idx", "<i8")


def test_values_of_documents(folders: list[Path], data: Path, tmp_path: Path) -> None:
    values = values_of(tmp_path, *folders, normalise="absolute")
    samples, got = (values.read(name).to_pandas() for name in ("samples", "documents"))
    want = documents_by_token(samples, {domain: document_starts(data, domain) for domain in DOMAINS})
    pd.testing.assert_frame_equal(got[list(want)], want, check_dtype=False, rtol=1e-11)
    assert got.value.sum() == pytest.approx(samples.value.sum(), rel=1e-11)


BY_WORD: dict[str, dict[str, Any]] = {
    "target": {"values": "exact", "by_target": True, "audited": range(12)},
    "position": {"granularity": "token"},
}


def parts_of(folder: Path, by_word: str) -> pd.DataFrame:
    """A row for each part of each use, in the unit of the value."""
    scores = scores_of(folder)
    parts = scores.target_value if by_word == "target" else scores.token
    scale = 1 if by_word == "target" else scores.lr * scores.clip_factor / scores.global_batch_size
    scale = weighted(scores, "absolute") / scores.value * scale
    table = scores[["sample_id", "domain", "block"]].assign(
        parts=parts, scale=scale, t=[range(T)] * len(scores)
    )
    table = table[parts.notna()].explode(["parts", "t"])
    return table.assign(part=(table.parts * table.scale).astype(float))


@pytest.mark.parametrize("by_word", BY_WORD)
def test_values_by_word(by_word: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against sums by hand: of samples, and of documents by the token that each part belongs to."""
    folders = [
        write_run(tmp_path / f"{seed}", data, seed=seed, null_steps=[NULL_STEP], **BY_WORD[by_word])
        for seed in (1, 2)
    ]
    values = values_of(tmp_path, *folders, normalise="absolute")
    words, samples = (values.read(name).to_pandas() for name in ("words", "samples"))
    parts = pd.concat([parts_of(folder, by_word) for folder in folders])
    want = parts.groupby(["sample_id", "t"]).part.sum().unstack() / 2
    has = words.parts.notna()
    assert values.by_word == by_word and words.sample_id.equals(samples.sample_id)
    assert words.sample_id[has].tolist() == want.index.tolist() and (~has).any() == (by_word == "position")
    np.testing.assert_allclose(np.stack(words.parts[has]), want, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(words.value, samples.value, rtol=1e-11, atol=1e-14)

    token = parts.block * T + parts.t + (by_word == "target")
    starts = {domain: document_starts(data, domain) for domain in DOMAINS}
    document = [int((starts[d] <= place).sum()) - 1 for d, place in zip(parts.domain, token, strict=True)]
    of_documents = parts.assign(document=document).groupby(["domain", "document"]).part.sum() / 2
    got = values.read("documents").to_pandas().set_index(["domain", "document"]).value
    np.testing.assert_allclose(got.dropna(), of_documents, rtol=1e-11, atol=1e-14)
    assert set(of_documents.index) == set(got.dropna().index)
    assert got.sum() == pytest.approx(samples.value.sum(), rel=1e-11)

    plain = BY_WORD[by_word] | {"granularity": "total", "by_target": False}
    by_tokens = write_run(tmp_path / "3", data, seed=3, **plain)
    kinds = {"target": "by target: a document has the parts", "position": "by position: a document"}
    status, out, _ = command(capsys, folders[0], by_tokens)
    assert status == 0 and "no split of values by word: the runs have different ones" in out
    assert kinds[by_word] not in out and "by their numbers of target tokens" in out
    assert not (folders[0] / "values" / "words.parquet").exists()
    assert json.loads((folders[0] / "values" / "values.json").read_text())["by_word"] is None
    status, out, _ = command(capsys, folders[0])
    assert status == 0 and kinds[by_word] in out and "words.parquet" in out
    shards = {shard.domain: shard for shard in list_shards(data, "train")}
    documents = Values.open(folders[0] / "values").read("documents").slice(0, 8).to_pylist()
    with ScoreDatabase([ScoredRun.open(folders[0])]) as database:
        for row in documents:
            uses = find_document_uses(database, shards[row["domain"]], row["document"], T).to_pandas()
            assert uses.block.nunique() == row["blocks"]
            assert uses.value.sum() == pytest.approx(row["value"] or 0, abs=1e-14)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_the_uses_of_a_sample_stay_together(rows: int, tmp_path: Path) -> None:
    ids = [1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4]
    pq.write_table(pa.table({"sample_id": ids}), tmp_path / "uses.parquet", row_group_size=rows)
    with pq.ParquetFile(tmp_path / "uses.parquet") as file:
        pieces = [piece["sample_id"].to_pylist() for piece in whole_samples(file)]
    assert [each for piece in pieces for each in piece] == ids
    assert sum(len(set(piece)) for piece in pieces) == 4


def test_positions_do_not_split_exact_values(data: Path, tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "run", data, granularity="token", values="exact", audited=range(12))
    status, out, _ = command(capsys, folder)
    assert status == 0 and "scores by position split values in pass, and these are exact" in out


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("value", "and parts that add up to .*: the scores are damaged"),
        ("dot_product", "has different numbers of parts in different steps, 5, 8, and not of padding"),
    ],
)
def test_parts_that_are_not_those_of_the_values(
    column: str, message: str, data: Path, tmp_path: Path, capsys
) -> None:
    folder = write_run(tmp_path / "run", data, steps=4, ranks=1, granularity="token", flush_every=4)
    (path,) = (folder / "grad_dotprods").iterdir()
    table = pq.read_table(path).to_pandas()
    short = table.token.map(lambda parts: parts[:5]) if column == "dot_product" else table.token * 2
    token = pd.concat([table.token[:6], short[6:]])
    if column == "dot_product":  # the first six samples again
        table.loc[6:, "dot_product"] = short[6:].map(np.sum)
        table["value"] = table.lr * table.clip_factor * table.row_weight * table.dot_product
        for name in ("sample_id", "domain", "block"):
            table[name] = [*table[name][:6]] * 2
    schema = pq.read_schema(path)
    pq.write_table(pa.Table.from_pandas(table.assign(token=token), schema, preserve_index=False), path)
    status, _, err = command(capsys, folder)
    assert status == 2 and re.search(message, err), err


@pytest.mark.parametrize("batch", [1, 3, 1 << 14])
def test_short_documents_and_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Documents of 2 to 30 tokens, so that a sample has text of many, and one of many samples' text."""
    random = np.random.default_rng(0)
    samples, starts, ends = [], {}, {}
    (tmp_path / "train").mkdir()
    for domain in ("a", "b", "c"):
        with ShardWriter(tmp_path / "train", domain, split="train", ids=GPT2_BYTES_IDS) as shard:
            for length in random.integers(1, 30, 40):
                shard.append(random.integers(0, 256, length))
        starts[domain] = document_starts(tmp_path, domain)
        ends[domain] = np.append(starts[domain][1:], shard.num_tokens)
        used = np.flatnonzero(random.random((shard.num_tokens - 1) // T) < 0.7)
        nulls = random.random(len(used)) < 0.3
        values = np.where(nulls, np.nan, random.standard_normal(len(used)))
        samples.append(pd.DataFrame({"domain": domain, "block": used, "value": values}))
    table = pd.concat(samples[::2])  # "b" was not used
    table.to_parquet(tmp_path / "samples.parquet")
    monkeypatch.setattr(attribution.documents, "BATCH", batch)
    monkeypatch.setattr(attribution.documents, "ROW_GROUP", 10)
    write_documents(
        tmp_path / "samples.parquet", list_shards(tmp_path, "train"), T, tmp_path / "documents.parquet"
    )
    got = pd.read_parquet(tmp_path / "documents.parquet")
    want = documents_by_token(table, starts)
    assert want.value.isna().any() and want.blocks.max() > 2 and (want.blocks == 1).any()
    pd.testing.assert_frame_equal(got[list(want)], want, check_dtype=False, rtol=1e-11, atol=1e-15)
    for row in got.itertuples():
        assert row.first_token == starts[row.domain][row.document]
        assert row.first_token + row.tokens == ends[row.domain][row.document]


def test_values_of_domains_and_steps(folders: list[Path], tmp_path: Path) -> None:
    values = values_of(tmp_path, *folders)
    samples = values.read("samples").to_pandas()
    groups = samples.groupby("domain").value
    want = pd.DataFrame(
        {
            "samples": samples.groupby("domain").size(),
            "uses": samples.groupby("domain").steps.sum(),
            "value": groups.sum(),
            "mean_value": groups.mean(),
            "share_negative": groups.agg(lambda each: (each < 0).sum() / each.count()),
            "share_of_absolute": groups.agg(lambda each: each.abs().sum()) / samples.value.abs().sum(),
        }
    ).sort_values("mean_value", ascending=False)
    got = values.read("domains").to_pandas()
    pd.testing.assert_frame_equal(got, want.reset_index(), check_dtype=False, rtol=1e-11)

    steps = values.read("steps").to_pandas()
    assert len(steps) == 24 and (steps.rows == 6).all()
    for run, folder in enumerate(folders):
        rows, own = scores_of(folder).groupby("step"), steps[steps.run == run].set_index("step")
        np.testing.assert_allclose(own.predicted, rows.value.sum(min_count=1), rtol=1e-12)
        np.testing.assert_allclose(own.absolute, rows.value.agg(lambda each: each.abs().sum(min_count=1)))
        np.testing.assert_allclose(own.train_loss, rows.train_loss.mean(), rtol=1e-12)
        losses = rows.val_loss.first()
        np.testing.assert_array_equal(
            own.measured, [*(losses[:-1].to_numpy() - losses[1:].to_numpy()), np.nan]
        )
        for name in ("lr", "clip_factor", "val_loss"):
            np.testing.assert_array_equal(own[name], rows[name].first())


def test_the_step_after_the_window_tells_what_its_last_one_did(folders: list[Path], tmp_path: Path) -> None:
    everything = values_of(tmp_path, folders[0]).read("steps").to_pandas()
    window = values_of(tmp_path, folders[0], steps=(3, 6)).read("steps").to_pandas()
    pd.testing.assert_frame_equal(window, everything[3:7].reset_index(drop=True))
    assert window.measured.notna().all()


def test_steps_that_gave_no_values(tmp_path: Path, data: Path) -> None:
    """Of a run that only ever skipped, or had learning rate 0."""
    run = write_run(tmp_path / "null", data, steps=2, null_steps=[0, 1])
    values = values_of(tmp_path, run, normalise="predicted")
    domains = values.read("domains").to_pandas()
    assert domains.mean_value.isna().all() and domains.share_of_absolute.isna().all()
    assert domains.uses.tolist() == [0] * len(domains) and domains.share_negative.isna().all()
    run = write_run(tmp_path / "zero", data, steps=2, zero_steps=[0, 1])
    assert (values_of(tmp_path, run, normalise="absolute").read("samples").to_pandas().value == 0).all()


def test_sums_are_the_same_every_time(tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "long", data, steps=300, flush_every=100)
    first = values_of(tmp_path, run).read("samples")
    assert all(values_of(tmp_path, run).read("samples").equals(first) for _ in range(3))


# ---- what docs/values.md shows to write oneself


def answers_of_the_page(folder: Path) -> list[Any]:
    """The values of all expressions in its Python lines about results/NAME, with this folder instead."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", VALUES_PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    blocks = [block for block in blocks if "results/NAME" in block]
    answers: list[Any] = []
    for block in blocks:
        lines = block.replace("results/NAME", json.dumps(str(folder))[1:-1])
        names: dict[str, object] = {}
        for statement in ast.parse(lines).body:
            if isinstance(statement, ast.Expr):
                answers.append(eval(ast.unparse(statement), names))
            else:
                exec(ast.unparse(statement), names)
    return answers


@pytest.fixture(scope="module")
def named_runs(tmp_path_factory: pytest.TempPathFactory, folders: list[Path]) -> Path:
    """The same run under many names, and another one."""
    results = tmp_path_factory.mktemp("named")
    other = Path(shutil.copytree(folders[1], results / "a"))  # [ab] is a pattern for it
    run = Path(shutil.copytree(folders[0], results / "plain"))
    for folder in (other, run):
        write_values([ScoredRun.open(folder)], folder / "values")
    for name in RUN_NAMES:
        shutil.copytree(run, results / name, copy_function=os.link)
    return results


@pytest.mark.parametrize("name", RUN_NAMES)
def test_the_lines_of_the_page_work_for_every_run_name(named_runs: Path, name: str) -> None:
    folder = named_runs / name
    scores, samples = scores_of(folder), pd.read_parquet(folder / "values" / "samples.parquet")
    documents = pd.read_parquet(folder / "values" / "documents.parquet")
    of_domains, of_samples, worst, mean_values, by_steps = answers_of_the_page(folder)
    want = scores.groupby("domain")["value"].sum()
    assert of_domains.to_dict() == want.to_dict()
    assert of_samples.tolist() == scores.groupby(["domain", "block"])["value"].sum().nlargest(10).tolist()
    assert worst.equals(documents.nsmallest(10, "value"))
    groups = samples.groupby("domain")["value"]
    assert dict(zip(mean_values["domain"], mean_values["samples"], strict=True)) == groups.size().to_dict()
    np.testing.assert_allclose(mean_values["mean_value"], groups.mean().sort_values(ascending=False))
    assert by_steps.columns.tolist() == ["from_step", "domain", "predicted_fall"]
    np.testing.assert_allclose(by_steps.set_index("domain")["predicted_fall"][want.index], want)


# ---- the audit


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Steps of two phases; the first one has no in-pass values."""
    folder = tmp_path_factory.mktemp("audited") / "run"
    return write_run(folder, data, steps=106, audited={0, 1, *range(5, 106, 4)}, null_steps={0})


def test_the_audit_against_pandas(audited: Path) -> None:
    with ScoreDatabase([ScoredRun.open(audited)]) as database:
        early, late = read_audits(measure_audit(database))
    rows = scores_of(audited).dropna(subset="of_batch")
    assert rows.exact_value.isna().sum() > 0
    rows["phase"] = (rows.step >= 100).astype(int)
    rows["in_pass"] = rows.lr * rows.clip_factor * rows.dot_product / rows.global_batch_size
    for phase, got in ((0, early), (1, late)):
        some = rows[rows.phase == phase]
        assert (got.first, got.last, got.steps) == (some.step.min(), some.step.max(), some.step.nunique())
        assert got.in_pass == pytest.approx(some.in_pass.sum())
        by_step = some.groupby("step").first()
        for name, column in (
            ("of_batch", "of_batch"),
            ("momentum", "momentum"),
            ("decay", "decay"),
            ("measured", "measured_fall"),
        ):
            assert getattr(got, name) == pytest.approx(by_step[column].sum())
        batch = by_step.of_batch
        fell = by_step.measured_fall - by_step.momentum - by_step.decay
        off = ((batch - fell).abs() - 2e-6).clip(lower=0).sum()
        assert got.distance == pytest.approx(off / fell.abs().sum())
        assert got.distance is not None and got.distance > 0
        assert got.cosine == pytest.approx(0.9)
        both = some.dropna(subset=["in_pass", "exact_value"])
        centred = both[["in_pass", "exact_value"]] - both.groupby("step")[
            ["in_pass", "exact_value"]
        ].transform("mean")
        assert got.rows == len(both) == (6 * 15 + 4 * 10 if phase == 0 else 4 * 2)
        assert got.pearson == pytest.approx(centred.corr().iloc[0, 1])
        assert got.spearman == pytest.approx(centred.corr("spearman").iloc[0, 1])
        x, y = centred.in_pass, centred.exact_value
        assert got.slope == pytest.approx((x * y).sum() / (x * x).sum())
    assert not early.too_few and late.too_few and "8 rows, too few to say" in str(late)
    assert f"correlation {early.pearson:+.2f}" in str(early)


@pytest.mark.parametrize(
    ("pearson", "slope", "right", "said"),
    [
        (0.9, 1.0, 1.0, []),
        (0.7, 1.0, 1.0, ["order the samples of a batch poorly (correlation 0.70"]),
        (0.9, 0.1, 1.0, ["the true ones are 0.1 times as large"]),
        (0.9, 1.0, 0.5, ["even exact values are 50% off from what their batches did to the loss"]),
    ],
)
def test_what_the_audit_warns_of(pearson: float, slope: float, right: float, said: list[str]) -> None:
    audit = Audit(0, 100, 900, 9, 40, pearson, pearson, slope, 0.9, 0.6, 0.5, 0.5, 0.3, 0.2, 1.0, 1 - right)
    warnings = audit.warnings(exact=False)
    assert len(warnings) == len(said) and all(want in got for want, got in zip(said, warnings, strict=True))
    assert len(audit.warnings(exact=True)) == (right < 1)
    assert replace(audit, pearson=math.nan).too_few and not audit.too_few
    for few, in_pass in ((29, 2.0), (29, -0.5), (40, 2.0)):
        if few == 40 and said:
            continue
        first, *others = replace(audit, rows=few, in_pass=in_pass).warnings(exact=False)
        assert f"in-pass values add up to {in_pass:+.3g} nats, and exact ones to +0.5" in first
    assert others == [warning for warning in warnings if "even" in warning]


def test_sums_of_the_same_steps_are_compared() -> None:
    """The first step of AdamW has exact values alone."""
    audit = Audit(0, 0, 9, 3, 40, 0.9, 0.9, 1.0, 0.9, 0.1, 5.0, 0.1, 0.3, 0.2, 5.5, 0.0)
    assert audit.warnings(exact=False) == []


@pytest.mark.parametrize(("version", "lacking"), [(3, ["row_weight", "of_batch"]), (4, ["row_weight"])])
def test_scores_of_older_versions(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], version: int, lacking: list[str]
) -> None:
    """All rows of a step count the same there; what version 3 lacks is what an audit adds up."""
    folder = write_run(tmp_path / "old", data, steps=6, ranks=1, audited={1, 4})
    want = values_of(tmp_path / "new", folder)
    for path in (folder / "grad_dotprods").iterdir():
        table = pq.read_table(path).drop_columns(lacking)
        changed = {**table.schema.metadata, b"format_version": str(version).encode()}
        pq.write_table(table.replace_schema_metadata(changed), path)
    status, out, _ = command(capsys, folder, "--output", tmp_path / "again")
    assert status == 0
    assert ("an older version of this program wrote these scores" in out) == ("of_batch" in lacking)
    found = values_of(tmp_path, folder)
    assert found.read("samples").equals(want.read("samples"))
    if "of_batch" not in lacking:
        # DuckDB's correlation depends on the order in which its threads add.
        pd.testing.assert_frame_equal(
            found.read("audit").to_pandas(), want.read("audit").to_pandas(), rtol=1e-12
        )
    run = ScoredRun.open(folder)
    assert not run.older and run.kind == ScoredRun.open(write_run(tmp_path / "new_run", data, steps=4)).kind
    assert "row_weight" not in run.scores().schema.names and run.scores().to_table().num_rows == 18


def test_scores_of_an_older_version(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They open, and say what their values are; with newer ones they have no common scale."""
    folder = write_run(tmp_path / "older", data, steps=4, ranks=1)
    for path in (folder / "grad_dotprods").iterdir():
        table = pq.read_table(path)
        table = table.drop_columns(["row_weight", "exact_value", *OF_STEP])
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"values"}
        configuration = json.dumps({"direction": "adamw", "optimizer": "AdamW"}).encode()
        metadata |= {b"format_version": b"2", b"run_configuration": configuration}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    run = ScoredRun.open(folder)
    assert run.older and "far larger than the effect of its steps" in run.kind
    assert pq.read_table(values_of(tmp_path, folder).path("audit")).num_rows == 0
    status, out, _ = command(capsys, folder, "--output", tmp_path / "again")
    assert status == 0 and "an older version of this program wrote these scores" in out
    newer = ScoredRun.open(write_run(tmp_path / "newer", data, steps=4))
    with pytest.raises(AttributionError, match="values of different kinds"):
        same_samples([run, newer])


def test_exact_values_are_what_is_summed(tmp_path: Path, data: Path) -> None:
    folder = write_run(tmp_path / "exact", data, steps=6, audited=range(6), values="exact")
    values = values_of(tmp_path, folder).read("samples").to_pandas().set_index("sample_id")["value"]
    want = scores_of(folder).groupby("sample_id")["exact_value"].sum()
    np.testing.assert_allclose(values, want[values.index])
    assert ScoredRun.open(folder).exact


def test_steps_of_half() -> None:
    steps = pa.table({"absolute": [1.0, None, 5.0, 2.0, 0.0]})
    assert count_steps_of_half(steps) == (1, 4)
    assert count_steps_of_half(pa.table({"absolute": [1.0, 1.0, 1.0, 1.0]})) == (2, 4)
    assert count_steps_of_half(pa.table({"absolute": pa.array([None], pa.float64())})) == (0, 0)


# ---- what is not as it should be


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = run_command("attribution.values", main, [str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        found = list((run / "grad_dotprods").glob(pattern))
        assert found
        for path in found:
            path.unlink()

    return spoil


def change(pattern: str, edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Another table in a file of scores."""

    def spoil(run: Path) -> None:
        (path,) = (run / "grad_dotprods").glob(pattern)
        pq.write_table(edit(pq.ParquetFile(path).read()), path)

    return spoil


def with_metadata(**metadata: str) -> Callable[[pa.Table], pa.Table]:
    changes = {key.encode(): value.encode() for key, value in metadata.items()}
    return lambda table: table.replace_schema_metadata({**table.schema.metadata, **changes})


def with_infinity(table: pa.Table) -> pa.Table:
    values = pa.array([np.inf, *table["value"].to_pylist()[1:]], pa.float64())
    return table.set_column(table.schema.get_field_index("value"), table.schema.field("value"), values)


def with_another_value(table: pa.Table) -> pa.Table:
    values = pa.array([table["value"][0].as_py() * (1 + 1e-6), *table["value"].to_pylist()[1:]], pa.float64())
    return table.set_column(table.schema.get_field_index("value"), table.schema.field("value"), values)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        config = json.loads((run / "config.json").read_text()) | changes
        (run / "config.json").write_text(json.dumps(config))

    return spoil


def stopped_after_its_last_files(run: Path) -> None:
    remove("*-00000000001*")(run)
    (run / "checkpoints/step_000012").mkdir(parents=True)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda run: (run / "config.json").unlink(), "not the folder of a run"),
    "a saved model": (lambda run: (run / "config.json").write_text("{}"), "is not of a run"),
    "settings of another version": (
        lambda run: (run / "config.json").write_text('{"method": "GradDotProd", "run_name": "a"}'),
        "config.json lacks pile_data_dir: another version",
    ),
    "settings that are no JSON": (lambda run: (run / "config.json").write_text("{"), "is not JSON"),
    "a Regular run": (edit_config(method="Regular"), "method Regular, which has no scores"),
    "no folder of scores": (lambda run: shutil.rmtree(run / "grad_dotprods"), "is not a folder of scores"),
    "no files": (remove("*"), "has no scores yet"),
    "the first file": (remove("step-000000000000*"), "no scores of steps 0 to 1: files are missing"),
    "files in the middle": (remove("step-00000000000[46]-*"), "no scores of steps 4 to 7: files are missing"),
    "a file of one process": (
        remove("step-000000000006-*.rank-00001*"), "scores of 3 samples in step 6, .* has 6: a process"
    ),
    "the last files": (
        stopped_after_its_last_files,
        "a checkpoint after 12 steps, but no scores of steps 10 to 11",
    ),
    "another version": (
        change("*0004-*.rank-00000*", with_metadata(format_version="9")), "has format_version '9'"
    ),
    "another run's file": (
        change("*0004-*.rank-00000*", with_metadata(run_configuration='{"seed": 9}')),
        "a folder holds the scores of one run",
    ),
    "not finite": (
        change("*0004-*.rank-00000*", with_infinity), "values in step 4 that are not finite.*--steps :3"
    ),
    "another value": (change("*0004-*.rank-00000*", with_another_value), "value in step 4 that is not lr"),
    "no Parquet": (
        lambda run: next((run / "grad_dotprods").glob("*0004-*")).write_text("x"), "is not a Parquet file"
    ),
    "no shards": (edit_config(pile_data_dir="/nowhere"), "no shards of split 'train' in /nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("of_the_disk", [True, False])
def test_an_error_of_the_disk_or_the_database_is_one_line(
    of_the_disk: bool, damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    def fails(self: ScoreDatabase, sql: str, path: Path, doing: str) -> None:
        self.query("SELECT error('ZSTD')", doing)

    if of_the_disk:
        monkeypatch.setattr(attribution.values, "write_json_atomically", full)
    else:
        monkeypatch.setattr(ScoreDatabase, "write", fails)
    status, _, err = command(capsys, damaged)
    assert status == 2 and "Traceback" not in err
    seen = "No space left on device" if of_the_disk else "ZSTD"
    assert re.search(f"^attribution.values: error: .*{seen}$", err, re.MULTILINE), err


@pytest.mark.parametrize("name", ["validation/rows.parquet", "metrics.jsonl"])
@pytest.mark.parametrize("in_its_place", [b"\x97\n", None], ids=["other bytes", "a loop"])
def test_a_file_that_cannot_be_read_is_one_error(
    name: str, in_its_place: bytes | None, damaged: Path
) -> None:
    path = damaged / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name) if in_its_place is None else path.write_bytes(in_its_place)
    run = ScoredRun.open(damaged)
    with pytest.raises(
        AttributionError,
        match=f"{path}(: Too many levels| is damaged| is missing| has a line that is not JSON)",
    ):
        run.metrics() if name == "metrics.jsonl" else run.validation_rows()


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    def fails(argv: list[str]) -> None:
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        run_command("attribution.values", fails, [])


def test_scores_of_another_version() -> None:
    run = ScoredRun(Path("a"), {}, {"run_configuration": "{}"}, ())
    with pytest.raises(AttributionError, match="configuration lacks direction: another version"):
        _ = run.direction


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_an_error(damage: str, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = DAMAGES[damage]
    spoil(damaged)
    status, out, err = command(capsys, damaged)
    assert status == 2 and out == "" and "Traceback" not in err
    assert re.search(message, err), err
    assert err.startswith("attribution.values: error: ")
    assert not (damaged / "values").exists() and not list(damaged.glob(".values*"))


@pytest.mark.parametrize("suffix", [".json", "*"])
def test_a_missing_shard(
    damaged: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    for path in (copy / "train").glob(f"Alpha{suffix}"):
        path.unlink()
    status, _, err = command(capsys, damaged, "--pile_data_dir", copy)
    assert status == 2
    assert (
        "has no Alpha.json beside it" if suffix == ".json" else f"{copy}/train has no shard of 'Alpha'"
    ) in err


def test_another_shard(
    folders: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    for path in (other / "train").glob("Alpha*"):
        path.unlink()
    with ShardWriter(other / "train", "Alpha", split="train", ids=GPT2_BYTES_IDS) as shard:
        shard.append(np.ones(5000, np.int64))
    status, _, err = command(capsys, folders[0], "--pile_data_dir", other)
    assert status == 2 and "Alpha.json is not the shard that" in err


def test_runs_of_different_data(folders: list[Path], data: Path, tmp_path: Path) -> None:
    of_one_domain = ScoredRun.open(write_run(tmp_path / "beta", data, steps=2, split="train:Beta [b]"))
    both = ScoredRun.open(folders[0])
    with pytest.raises(AttributionError, match="runs of different data: their split is train and train:Beta"):
        same_samples([of_one_domain, both])
    with pytest.raises(AttributionError, match="named twice"):
        same_samples([both, ScoredRun.open(folders[1]), ScoredRun.open(folders[0])])
    preconditioned = ScoredRun.open(write_run(tmp_path / "adamw", data, steps=2, direction="auto"))
    with pytest.raises(AttributionError, match="values of different kinds"):
        same_samples([preconditioned, both])
    assert set(of_one_domain.checksums) == {"Beta [b]"} and of_one_domain.domains == DOMAINS
    assert values_of(tmp_path, of_one_domain.folder).read("domains")["domain"].to_pylist() == ["Beta [b]"]
    blocks = of_one_domain.blocks()
    assert blocks.domains == ("Beta [b]",) and blocks.sample_id("Beta [b]", 3) == (1 << 40) + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "--steps '5': give FIRST:LAST"),
        (["--steps", "a:b"], "--steps 'a:b': give FIRST:LAST"),
        (["--steps", "7:3"], "--steps 7:3: ends before it begins"),
        (["--steps", "3:99"], "--steps 3:99: .* has scores of steps 0 to 11"),
        (["--steps", "12:"], "--steps 12:: .* has scores of steps 0 to 11"),
        (["--memory_limit", "much"], "--memory_limit 'much': give a number and a unit"),
        (["--memory_limit", "1MB"], "--memory_limit 1MB is too low"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str], message: str, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = command(capsys, damaged, *arguments)
    assert status == 2 and re.search(message, err) and err.count("\n") == 1, err
    assert not list(damaged.glob("*values*"))


def test_parse_steps() -> None:
    assert [parse_steps(text) for text in (":", "3:", ":4", "3:4")] == [
        (None, None),
        (3, None),
        (None, 4),
        (3, 4),
    ]


# ---- the folder of values, and the command


def test_an_older_folder_is_replaced_and_nothing_else(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, damaged, "--steps", "0:3")[0] == 0
    assert command(capsys, damaged)[0] == 0
    folder = damaged / "values"
    assert len(Values.open(folder).read("steps")) == 12
    assert sorted(os.listdir(folder)) == sorted(["values.json", *(f"{name}.parquet" for name in FILES)])
    remove("step-000000000004*")(damaged)
    assert command(capsys, damaged)[0] == 2
    assert len(Values.open(folder).read("steps")) == 12, "the older values stay"
    assert sorted(path.name for path in damaged.iterdir()) == ["config.json", "grad_dotprods", "values"]
    (damaged / "thesis").mkdir()
    (damaged / "thesis" / "chapter").write_text("precious")
    status, _, err = command(capsys, damaged, "--output", damaged / "thesis")
    assert status == 2 and "thesis is not a folder of values" in err
    assert (damaged / "thesis" / "chapter").read_text() == "precious"
    status, _, err = command(capsys, damaged, "--output", damaged / "thesis" / "chapter" / "values")
    assert status == 2 and "cannot make" in err


def test_a_folder_that_is_not_whole(folders: list[Path], tmp_path: Path) -> None:
    folder = values_of(tmp_path, folders[0]).folder
    table = pq.read_table(folder / "samples.parquet")
    pq.write_table(table[:-1], folder / "samples.parquet")
    with pytest.raises(AttributionError, match=r"samples.parquet has \d+ rows of .* not \d+ of"):
        Values.open(folder)
    pq.write_table(table, folder / "samples.parquet")
    Values.open(folder)
    (folder / "documents.parquet").unlink()
    with pytest.raises(AttributionError, match=r"documents.parquet is missing"):
        Values.open(folder)
    manifest = json.loads((folder / "values.json").read_text())
    (folder / "values.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(AttributionError, match="'format_version': 9"):
        Values.open(folder)
    with pytest.raises(AttributionError, match="is not a folder of values"):
        Values.open(tmp_path)


def test_two_processes_do_not_write_one_folder(folders: list[Path], tmp_path: Path) -> None:
    with being_written(tmp_path / "values") as unfinished:
        with pytest.raises(AttributionError, match="another process writes values there"):
            values_of(tmp_path, folders[0])
        assert unfinished.is_dir()
        shutil.copytree(values_of(tmp_path / "other", folders[0]).folder, unfinished, dirs_exist_ok=True)
    Values.open(tmp_path / "values")


def test_the_table(
    folders: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "values"
    status, out, err = command(capsys, *folders, "--output", folder)
    assert (status, err) == (0, "")
    values = Values.open(folder)
    rows = [line.split("  ")[0] for line in out.splitlines()[2:4]]
    assert rows == values.read("domains")["domain"].to_pylist()
    samples = values.read("samples").to_pandas().dropna().sort_values("value", ascending=False)
    shown = [line for line in out.splitlines() if ", block " in line]
    want = [*samples.iloc[:3].itertuples(), *samples.iloc[:-4:-1].itertuples()]
    for row, line in zip(want, shown, strict=True):
        assert line.startswith(f"{row.value:+.3e}  {row.domain}, block {row.block}  ")
    for line in audit_lines([ScoredRun.open(each) for each in folders], values.read("audit")):
        assert line in out
    for name in FILES:
        assert str(folder / f"{name}.parquet") in out


# ---- runs, and the database


def test_what_a_run_says_of_itself(folders: list[Path], data: Path, tmp_path: Path) -> None:
    run = ScoredRun.open(folders[0])
    assert (run.block_size, run.split, run.granularity, run.domains) == (T, "train", "total", DOMAINS)
    assert [path.name for path in run.files] == sorted(os.listdir(folders[0] / "grad_dotprods"))
    want = BlockDataset.open(data, T, parse_set("--train_set", "train"))
    more = Path(shutil.copytree(data, tmp_path / "data"))
    with ShardWriter(more / "train", "Aardvarks", split="train", ids=GPT2_BYTES_IDS) as shard:
        shard.append(np.ones(50, np.int64))
    for blocks in (run.blocks(), run.blocks(more)):  # a domain more does not change the ids
        assert blocks.blocks_per_domain == want.blocks_per_domain
        assert blocks.sample_id("Beta [b]", 3) == want.sample_id("Beta [b]", 3)


def test_records_and_validation_rows(damaged: Path, data: Path) -> None:
    (damaged / "metrics.jsonl").write_text('{"step": 0, "train_loss": 1.5}\n{"step": 1, "train_loss"')
    batch = BlockDataset.open(data, T, parse_set("--val_set", "val")).batch([("Alpha", 2), ("Beta [b]", 0)])
    save_validation_rows(batch, [Shown("one"), Shown("two")], damaged / "validation" / "rows.parquet")
    run = ScoredRun.open(damaged)
    assert run.metrics() == [{"step": 0, "train_loss": 1.5}], "a line that is being written is left out"
    rows = run.validation_rows().to_pandas()
    assert rows.domain.tolist() == ["Alpha", "Beta [b]"] and rows.block.tolist() == [2, 0]
    assert [len(tokens) for tokens in rows.tokens] == [T + 1] * 2


def test_the_tables_of_the_database(tmp_path: Path, data: Path, folders: list[Path]) -> None:
    pairwise = write_run(tmp_path / "pairwise", data, granularity="pairwise", steps=3)
    with ScoreDatabase([ScoredRun.open(pairwise), ScoredRun.open(folders[0])], steps=(1, 2)) as database:
        sql = "SELECT * FROM scores ORDER BY run, step, rank, sample_id"
        rows = database.query(sql, "reading").to_pandas()
        rest = database.query("SELECT count(*) AS n FROM steps WHERE run = ?", "counting", [1]).to_pylist()
    assert rest == [{"n": 2}]
    want = [scores_of(folder).query("1 <= step <= 2") for folder in (pairwise, folders[0])]
    want = pd.concat(want, keys=[0, 1], names=["run"]).reset_index("run")
    want = want.sort_values(["run", "step", "rank", "sample_id"])
    for name in ("run", "step", "sample_id", "domain", "block", "dot_product", "value", "train_loss"):
        assert rows[name].tolist() == want[name].tolist()
    assert [list(each) for each in rows.pairwise[rows.run == 0]] == [
        list(each) for each in want.pairwise[want.run == 0]
    ]
    assert rows.pairwise[rows.run == 1].isna().all()
    assert rows.weighted_value.equals(rows.value)


ENDLESS = "SELECT sum(hash(a.range + b.range) % 7) AS s FROM range(1000000) a, range(1000000) b"


def test_what_takes_long_shows_a_bar_and_can_be_interrupted(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.1)
    with ScoreDatabase([ScoredRun.open(folders[0])], spill_folder=tmp_path) as database:
        timer = threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            database.query(ENDLESS, "adding hashes")
        assert database.query("SELECT 1 AS x", "going on").to_pylist() == [{"x": 1}]
        assert os.listdir(tmp_path)
    assert not os.listdir(tmp_path)
    assert "adding hashes" in capsys.readouterr().err


def test_ctrl_c_ends_the_command(damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attribution.samples.write_documents", interrupted)
    assert command(capsys, damaged)[0] == 130
    assert not list(damaged.glob("*values*"))
