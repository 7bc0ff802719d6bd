"""Curated shards: what was chosen is gone, all else is there as it was, and training runs on it."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_helpers import DOMAINS, Run, start, tree, write_shards

from attribution.curate import command as command
from attribution.curate import curated_folder, cut_shards
from attribution.curate.command import curate
from attribution.curate.curated_folder import CutShard
from attribution.curate.cut_shards import cut_shard
from attribution.curate.drop_rule import DropRule, choose
from attribution.database import ScoreDatabase
from attribution.errors import AttributionError
from attribution.options import run_command
from attribution.scored_run import ScoredRun
from data_processing.shards import (
    GPT2_BYTES_IDS,
    GPT2_IDS,
    Shard,
    ShardWriter,
    domain_file_name,
    list_shards,
    open_shard,
)
from foundation.progress import progress_bar

T = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("curate") / "shards")


@pytest.fixture(scope="module")
def trained(data: Path) -> Run:
    """Some samples are used, others not; the last steps have some of negative value."""
    flags = {"block_size": T, "batch_size": 64, "max_steps": 5, "warmup_step": 0, "learning_rate": 0.03}
    return start(data, data.parent, run_name="run", **flags)


@pytest.fixture
def run(trained: Run) -> ScoredRun:
    return ScoredRun.open(trained.folder)


def summed(trained: Run) -> pd.Series:
    """The oracle of samples' values: (domain, block) -> value."""
    return trained.scores().groupby(["domain", "block"])["value"].sum()


def shard_of(folder: Path, domain: str, split: str = "train") -> Shard:
    return next(shard for shard in list_shards(folder, split) if shard.domain == domain)


def inputs(shard: Shard) -> list[bytes]:
    """The x of every block."""
    count = (shard.num_tokens - 1) // T
    return [shard.tokens[block * T : (block + 1) * T].tobytes() for block in range(count)]


def check_samples(source: Path, target: Path, dropped: set[tuple[str, int]]) -> None:
    """The x of all other blocks follow each other; documents begin where they did, and at each gap."""
    for domain in DOMAINS:
        old, new = shard_of(source, domain), shard_of(target, domain)
        old_inputs = inputs(old)
        kept = [block for block in range(len(old_inputs)) if (domain, block) not in dropped]
        assert inputs(new) == [old_inputs[block] for block in kept]
        assert new.tokens[len(kept) * T :].tolist() == old.tokens[len(old_inputs) * T :].tolist()
        starts = set(old.document_starts.tolist())
        places = [block * T + position for block in kept for position in range(T)]
        places += range(len(old_inputs) * T, old.num_tokens)
        expected = [
            new_place
            for new_place, (before, place) in enumerate(zip([-2, *places], places, strict=False))
            if place in starts or place != before + 1
        ]
        assert new.document_starts.tolist() == expected


def test_negative_samples_are_left_out_and_nothing_else(
    trained: Run, run: ScoredRun, data: Path, tmp_path: Path
) -> None:
    values = summed(trained)
    lowest = set(values.index[values < 0])
    assert 0 < len(lowest) < len(values) < sum(len(inputs(shard_of(data, domain))) for domain in DOMAINS)
    curate([run], tmp_path / "new", drop="negative")
    check_samples(data, tmp_path / "new", lowest)


def test_the_lowest_share_is_left_out_and_told_of(
    trained: Run, run: ScoredRun, data: Path, tmp_path: Path
) -> None:
    values = summed(trained)
    count = int(0.25 * len(values))
    lowest = values.nsmallest(count)
    manifest = curate([run], tmp_path / "new", drop="bottom:0.25")
    check_samples(data, tmp_path / "new", set(lowest.index))
    table = pd.read_parquet(tmp_path / "new" / "dropped.parquet")
    assert list(zip(table["domain"], table["block"], strict=True)) == sorted(lowest.index)
    expected = lowest.sort_index().to_numpy()
    np.testing.assert_allclose(table["value"], expected, rtol=1e-12)
    assert set(table["reason"]) == {f"among the {count} lowest of {len(values)} values"}
    assert json.loads((tmp_path / "new" / "curation.json").read_text()) == json.loads(json.dumps(manifest))
    assert manifest["drop"] == "bottom:0.25"
    assert manifest["unit"] == "samples"
    assert manifest["source"] == str(data)
    assert manifest["runs"][0]["folder"] == str(trained.folder)
    assert manifest["highest_dropped_value"] == pytest.approx(lowest.max())
    assert manifest["lowest_kept_value"] == pytest.approx(values.drop(lowest.index).min())
    for domain in DOMAINS:
        dropped = int((lowest.index.get_level_values(0) == domain).sum())
        old = shard_of(data, domain)
        assert manifest["domains"][domain] == {
            "state": "cut",
            "units": len(inputs(old)),
            "with_value": int((values.index.get_level_values(0) == domain).sum()),
            "dropped": dropped,
            "tokens_before": old.num_tokens,
            "tokens_after": old.num_tokens - dropped * T,
            "source_sha256": old.checksum,
        }


def test_a_threshold_of_a_window_of_steps(trained: Run, run: ScoredRun, data: Path, tmp_path: Path) -> None:
    scores = trained.scores()
    values = scores[scores["step"] <= 1].groupby(["domain", "block"])["value"].sum()
    ordered = values.sort_values()
    limit = float(ordered.iloc[9] + ordered.iloc[10]) / 2
    curate([run], tmp_path / "new", drop=f"threshold:{limit!r}", steps=(None, 1))
    check_samples(data, tmp_path / "new", set(ordered.index[:10]))


def document_values(trained: Run, data: Path) -> dict[tuple[str, int], float]:
    """The oracle of documents' values: a loop over the targets."""
    found: dict[tuple[str, int], float] = {}
    for (domain, block), value in summed(trained).items():
        starts = shard_of(data, domain).document_starts.tolist()
        for target in range(block * T + 1, block * T + T + 1):
            key = domain, sum(start <= target for start in starts) - 1
            found[key] = found.get(key, 0) + value / T
    return found


def test_documents_are_there_as_a_whole_or_not_at_all(
    trained: Run, run: ScoredRun, data: Path, tmp_path: Path
) -> None:
    values = document_values(trained, data)
    lowest = sorted(values, key=lambda place: values[place])[: int(0.4 * len(values))]
    manifest = curate([run], tmp_path / "new", drop="bottom:0.4", unit="documents")
    for domain in DOMAINS:
        old, new = shard_of(data, domain), shard_of(tmp_path / "new", domain)
        ends = [*old.document_starts.tolist(), old.num_tokens]
        texts = [old.tokens[ends[number] : ends[number + 1]] for number in range(old.num_documents)]
        kept = [text for number, text in enumerate(texts) if (domain, number) not in lowest]
        assert len(kept) < len(texts)
        assert new.tokens.tolist() == np.concatenate(kept).tolist()
        assert new.document_starts.tolist() == np.cumsum([0, *map(len, kept)])[:-1].tolist()
        assert manifest["domains"][domain]["units"] == old.num_documents
    table = pd.read_parquet(tmp_path / "new" / "dropped.parquet")
    assert list(zip(table["domain"], table["document"], strict=True)) == sorted(lowest)


def test_the_rest_of_the_folder_is_the_same(run: ScoredRun, data: Path, tmp_path: Path) -> None:
    (data / "val" / "inputs.manifest").write_text("of the tokenizer")
    curate([run], tmp_path / "new", drop="bottom:0.001")  # nothing
    expected = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    found = {
        path.relative_to(tmp_path / "new"): path for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    assert {name.name for name in found.keys() - expected.keys()} == {"curation.json", "dropped.parquet"}
    for name, content in expected.items():
        assert found[name].read_bytes() == content
        assert found[name].samefile(data / name)


def test_without_links_files_are_copied(
    run: ScoredRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(curated_folder, "COPY_BYTES", 1000)
    curate([run], tmp_path / "new", drop="negative")
    for path in (data / "val").iterdir():
        copy = tmp_path / "new" / "val" / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert not copy.samefile(path)


def test_training_runs_on_it_and_can_be_curated_again(
    trained: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(trained.folder), "--drop", "negative", "--output", str(tmp_path / "new [1]")]
    assert run_command("attribution.curate", command.main, arguments) == 0
    out = capsys.readouterr().out
    assert "samples left out: value < 0" in out
    assert f"--pile_data_dir '{tmp_path / 'new [1]'}'" in out
    assert "Beta [b]" in out
    again = start(tmp_path / "new [1]", tmp_path, run_name="again", block_size=T, batch_size=8, max_steps=2)
    assert again.status == 0
    curate([ScoredRun.open(again.folder)], tmp_path / "newer", drop="bottom:0.5")
    check_samples(tmp_path / "new [1]", tmp_path / "newer", set(summed(again).nsmallest(8).index))


def tiny_run(folder: Path, **flags: object) -> ScoredRun:
    """Of one step, on two domains of 5 and 2 blocks."""
    for split in ("train", "val", "test"):
        (folder / "shards" / split).mkdir(parents=True)
        for domain, length in (("A", 42), ("B", 20)):
            with ShardWriter(folder / "shards" / split, domain, split=split, ids=GPT2_BYTES_IDS) as writer:
                writer.append(np.arange(length) % 200)
    flags = {"block_size": T, "batch_size": 7, "max_steps": 1, "warmup_step": 0, **flags}
    return ScoredRun.open(start(folder / "shards", folder, run_name="tiny", **flags).folder)


def test_a_domain_can_vanish_and_untrained_ones_stay(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny_run(tmp_path, train_set="train:B")
    manifest = curate([run], tmp_path / "new", drop="bottom:1")
    assert [row["state"] for row in manifest["domains"].values()] == ["unchanged", "left out"]
    assert [row["dropped"] for row in manifest["domains"].values()] == [0, 2]
    assert [shard.domain for shard in list_shards(tmp_path / "new", "train")] == ["A"]
    shard = shard_of(tmp_path / "shards", "A")
    left = [CutShard(shard, "documents", T, 1, 1, shard.num_tokens - tokens).state for tokens in (T, T + 1)]
    assert left == ["left out", "cut"], "a block has T+1 tokens"
    capsys.readouterr()
    command.print_curation(tmp_path / "new", manifest)
    out = capsys.readouterr().out
    assert "domain B is left out as a whole: fewer than the 9 tokens of a block would stay" in out
    assert "samples that no step gave a value are kept: 5\n" in out


def test_if_nothing_would_be_left_it_is_an_error(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(AttributionError, match=r"no block would be left of any domain .*7 samples"):
        curate([run], tmp_path / "new", drop="threshold:1e9")
    assert tree(tmp_path) == before


RANGES = [
    [],
    [(0, 1)],
    [(0, 3), (3, 4)],
    [(2, 9), (10, 30), (39, 40)],
    [(35, 40)],
    [(5, 6), (7, 8), (20, 21)],
]


@pytest.mark.parametrize("ranges", RANGES)
def test_cutting_in_windows_is_leaving_out_ranges(
    ranges: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_shards, "WINDOW_TOKENS", 7)
    draw = random.Random(str(ranges))
    with ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS) as writer:
        for length in (1, 12, 3, 20):
            writer.append([draw.randrange(GPT2_IDS.end_of_text) for _ in range(length)])
    (shard,) = [open_shard(tmp_path / "A.json")]
    assert shard.num_tokens == 40
    gone = {place for start, stop in ranges for place in range(start, stop)}
    kept = [place for place in range(40) if place not in gone]
    expected = shard.tokens[kept].tolist()
    starts = [
        new for new, place in enumerate(kept)
        if place in shard.document_starts or (place - 1 in gone)
    ]  # fmt: skip
    (tmp_path / "new").mkdir()
    pieces = iter([np.array(piece, np.int64).reshape(-1, 2) for piece in (ranges[:1], [], ranges[1:])])
    with ShardWriter(tmp_path / "new", "A", split="train", ids=GPT2_IDS) as writer:
        cut_shard(shard, pieces, writer, progress_bar("cutting", 80, "B"))
    new = open_shard(tmp_path / "new" / "A.json", verify_checksum=True)
    assert new.tokens.tolist() == expected + [GPT2_IDS.end_of_text] * (expected[-1] != GPT2_IDS.end_of_text)
    assert new.document_starts.tolist() == starts


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("bottom:0.5", [0, 1, 5]),
        ("bottom:0.84", [0, 1, 3, 4, 5]),
        ("negative", [0, 5]),
        ("threshold:0.1", [0, 1, 3, 5]),
    ],
)
def test_equal_values_are_chosen_in_the_order_of_their_ids(
    run: ScoredRun, tmp_path: Path, rule: str, expected: list[int]
) -> None:
    """Nor do decimals and binary fractions disagree: 0.1 is not below 0.1, and 0.29 of 100 are 29."""
    values = pa.array([-1.0, 0.0, None, 0.0, 0.1, -2.0, 7.0])
    units = {"domain": ["A", *["B"] * 6], "sample_id": range(7), "block": range(7), "value": values}
    pq.write_table(pa.table({name: pa.array(column) for name, column in units.items()}), tmp_path / "units")
    with ScoreDatabase([run]) as database:
        choice = choose(database, tmp_path / "units", "samples", DropRule.parse(rule), tmp_path / "chosen")
    assert pq.read_table(tmp_path / "chosen")["sample_id"].to_pylist() == expected
    assert choice.with_value == {"A": 1, "B": 5}
    assert choice.dropped == {"A": 1, "B": len(expected) - 1}
    assert choice.highest_dropped == max(values[number].as_py() for number in expected)
    assert DropRule.parse("bottom:0.29").count(100) == 29


NO_RULES = (
    "", "positive", "negative:1", "bottom", "bottom:", "bottom:0", "bottom:1.5", "bottom:-1", "bottom:nan",
    "bottom:0,16", "threshold", "threshold:x", "threshold:inf", "threshold:sNaN", "threshold:1e999",
)  # fmt: skip


@pytest.mark.parametrize("rule", NO_RULES)
def test_a_rule_that_is_none_is_an_error(rule: str) -> None:
    with pytest.raises(AttributionError, match=r"--drop .*bottom:0\.16"):
        DropRule.parse(rule)


def test_what_cannot_be_done_is_an_error_and_leaves_nothing(
    trained: Run, run: ScoredRun, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def fails(message: str, output: Path = tmp_path / "new", drop: str = "negative") -> None:
        before = tree(data.parent), tree(tmp_path)
        with pytest.raises(ValueError, match=message):
            curate([run], output, drop=drop)
        assert (tree(data.parent), tree(tmp_path)) == before

    fails("is there already", output=data)
    fails("lies in the folder of its own source", output=data / "new")
    (tmp_path / "file").touch()
    fails("cannot make .*Not a directory", output=tmp_path / "file" / "new")
    damaged = data / "test" / f"{domain_file_name(DOMAINS[0])}.bin"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-2])
    fails("truncated or foreign")
    damaged.write_bytes(content)
    arguments = [str(trained.folder), "--drop", "lowest", "--output", str(tmp_path / "new")]
    assert run_command("attribution.curate", command.main, arguments) == 2
    assert capsys.readouterr().err.startswith("attribution.curate: error: --drop 'lowest': say negative")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_or_failed_it_leaves_nothing(
    run: ScoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def extend_cut(*arguments: object) -> None:
        assert len(list(tmp_path.rglob("*.bin"))) == 4, "val and test are there by now"
        raise failure

    monkeypatch.setattr(ShardWriter, "extend_cut", extend_cut)
    with pytest.raises((AttributionError, KeyboardInterrupt), match=r"nothing was written: .*No space|^$"):
        curate([run], tmp_path / "new", drop="negative")
    assert list(tmp_path.iterdir()) == []


def test_hidden_files_are_not_copied(data: Path, tmp_path: Path) -> None:
    """As macOS leaves them beside shards on other file systems."""
    shutil.copytree(data, tmp_path / "source")
    for name in ("val/._Alpha.json", "val/._Alpha.bin", "test/.DS_Store"):
        (tmp_path / "source" / name).write_bytes(b"\0\5\x16\7")
    others = curated_folder.find_other_splits(tmp_path / "source", "train")
    assert [path.name for path in others] == ["test", "val"]
    (tmp_path / "target").mkdir()
    curated_folder.write_splits(tmp_path / "target", others, [], tmp_path / "none")
    for split in ("test", "val"):
        copied = {path.name for path in (tmp_path / "target" / split).iterdir()}
        assert copied == {path.name for path in (data / split).iterdir()}
