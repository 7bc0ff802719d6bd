"""The scores on disk: what is in them, and that no crash loses or doubles a row."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from foundation.granularity import Granularity
from score_store.files import FILE_NAME, recover
from score_store.schema import SCORE_SCHEMA, ScoreError, score_schema
from score_store.writer import ExactRows, ScoredStep, ScoreWriter, open_scores

RUN = {"run": "a", "block_size": "8"}
DOMAINS = ("ArXiv", "Wikipedia (en)", "Pile-CC")


def open_writer(
    folder: Path, rank: int = 0, run: dict[str, str] = RUN, rows_per_file: int = 6, **options: Any
) -> ScoreWriter:
    return ScoreWriter(folder, rank=rank, metadata=run, rows_per_file=rows_per_file, **options)


def append(writer: ScoreWriter, step: int, n: int = 2, **changes: Any) -> None:
    """Rows that can be told apart: the dot product of row i of a step is step + i / 10."""
    blocks = np.arange(n) + step % 3
    of_step: dict[str, Any] = {
        "val_loss": torch.tensor(step + 0.25), "lr": 0.1, "clip_factor": 0.5, "global_batch_size": n, "null": False
    }  # fmt: skip
    row: dict[str, Any] = {
        "sample_ids": blocks + 1000,
        "domains": [DOMAINS[block % 3] for block in blocks],
        "blocks": blocks,
        "dot_products": step + torch.arange(n) / 10,
        "train_losses": torch.arange(n) + 0.5,
    }
    for name in changes:
        (of_step if name in of_step else row)[name] = changes[name]
    writer.append(ScoredStep(step, **of_step), **row)


def write(folder: Path, steps: range, **options) -> None:
    """One file per step, then whatever close() makes of them."""
    with open_writer(folder, **options) as writer:
        for step in steps:
            append(writer, step)
            writer.flush()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def read(folder: Path) -> pd.DataFrame:
    """As a user does."""
    return pd.read_parquet(folder)


def rows(table: pd.DataFrame | pa.Table) -> list[tuple[int, float]]:
    """Which rows a table has, as (step, dot product), sorted."""
    steps, dots = (np.asarray(table[name]).tolist() for name in ("step", "dot_product"))
    return sorted((step, round(dot, 6)) for step, dot in zip(steps, dots, strict=True))


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, round(step + i / 10, 6)) for step in steps for i in range(2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "grad_dotprods [1]"  # glob characters must do no harm


# ---- what is written


def test_rows_are_as_documented(folder: Path) -> None:
    clip = torch.tensor(0.3, dtype=torch.float32)
    with open_writer(folder, rank=3) as writer:
        append(writer, 0, n=2, clip_factor=clip, lr=6e-4, global_batch_size=16)
        append(writer, 1, n=3, null=torch.tensor(True), clip_factor=float("nan"))
    table = read(folder)
    assert list(table.columns) == SCORE_SCHEMA.names
    first = table[table.step == 0]
    assert first.sample_id.tolist() == [1000, 1001] and first.block.tolist() == [0, 1]
    assert first.domain.tolist() == ["ArXiv", "Wikipedia (en)"]
    assert first["rank"].tolist() == [3, 3] and first.global_batch_size.tolist() == [16, 16]
    assert first.train_loss.tolist() == [0.5, 1.5]
    assert first.val_loss.tolist() == [0.25, 0.25]
    dots = np.array([0.0, np.float32(0.1)], np.float64)
    assert first.dot_product.tolist() == dots.tolist()
    assert first.clip_factor.tolist() == [float(np.float32(0.3))] * 2
    np.testing.assert_allclose(first.value, 6e-4 * float(clip) * dots / 16, rtol=1e-15)
    assert first.row_weight.tolist() == [1 / 16] * 2
    skipped = open_scores(folder).to_table().filter(pc.field("step") == 1)
    assert skipped["dot_product"].null_count == skipped["value"].null_count == 3
    assert skipped["train_loss"].to_pylist() == [0.5, 1.5, 2.5]


def test_the_value_of_a_helpful_sample_is_positive(folder: Path) -> None:
    """Descending along a gradient that agrees with the validation gradient lowers the validation loss."""
    with open_writer(folder) as writer:
        append(writer, 0, dot_products=torch.tensor([2.0, -2.0]))
    assert (read(folder).value > 0).tolist() == [True, False]


def test_float64_dot_products_keep_their_digits(folder: Path) -> None:
    dots = torch.tensor([1 / 3, 1e-300], dtype=torch.float64)
    with open_writer(folder) as writer:
        append(writer, 0, dot_products=dots, train_losses=dots)
    assert read(folder).dot_product.tolist() == read(folder).train_loss.tolist() == dots.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float_type_can_be_appended(folder: Path, dtype: torch.dtype) -> None:
    with open_writer(folder) as writer:
        append(writer, 0, dot_products=torch.tensor([0.25, 3.0], dtype=dtype))
    assert read(folder).dot_product.tolist() == [0.25, 3.0]


def test_the_schema_is_in_every_file_with_the_runs_metadata(folder: Path) -> None:
    write(folder, range(4))
    for name in names(folder):
        schema = pq.read_schema(folder / name)
        assert schema.equals(SCORE_SCHEMA)
        want = RUN | {
            "granularity": "total", "values": "in_pass", "format": "ghostEngines scores", "format_version": "5"
        }  # fmt: skip
        assert schema.metadata == {key.encode(): value.encode() for key, value in want.items()}
    assert not SCORE_SCHEMA.field("step").nullable and SCORE_SCHEMA.field("value").nullable


def test_unknown_granularity() -> None:
    assert score_schema("total") == SCORE_SCHEMA
    with pytest.raises(ScoreError, match="granularity 'layer'"):
        score_schema("layer")


def test_lists_of_the_rows_own_lengths(folder: Path) -> None:
    """Of batches that are padded to their longest rows."""
    options: Any = {"granularity": "token", "values": "exact", "by_target": True}
    both = [torch.tensor([[1.0, 2.0], [3.0, 0.5]]), torch.tensor([[4.0, 5.0, 6.0], [7.0, 8.0, 0.0]])]
    with open_writer(folder, **options) as writer:
        for step, parts in enumerate(both):
            values = parts.sum(1).float() * (1 + 1e-7)  # in float32, the writer's sum is in float64
            if step == 1:
                parts, values = parts.clone(), values.clone()
                parts[1] = values[1] = torch.nan
            exact = ExactRows(values, 1.0, 0.0, 0.0, 1.0, 1.0, by_target=parts)
            append(writer, step, dot_products=both[step], exact=exact)
        append(writer, 2, dot_products=both[0])
        with pytest.raises(ValueError, match="ExactRows without by_target, in a run with by_target=True"):
            append(writer, 3, dot_products=both[0], exact=ExactRows(values, 1.0, 0.0, 0.0, 1.0, 1.0))
        for parts, message in (
            (2 * both[0], "parts that do not add up"),
            (both[0][:1], r"\(n, T\), got shape \(1, 2\) for 2 values"),
        ):
            exact = ExactRows(both[0].sum(1), 1.0, 0.0, 0.0, 1.0, 1.0, by_target=parts)
            with pytest.raises(ValueError, match=message):
                append(writer, 3, dot_products=both[0], exact=exact)
    found = read(folder)
    assert [None if row is None else list(row) for row in found.token] == [
        row for parts in (*both, both[0]) for row in parts.tolist()
    ]
    assert [None if row is None else list(row) for row in found.target_value] == [
        [1.0, 2.0], [3.0, 0.5], [4.0, 5.0, 6.0], None, None, None
    ]  # fmt: skip
    assert found.exact_value.tolist()[:3] == [3.0, 3.5, 15.0] and found.exact_value[3:].isna().all()
    assert pq.read_schema(next(folder.glob("*.parquet"))).metadata[b"by_target"] == b"yes"
    with pytest.raises(ScoreError, match="has by_target 'yes', expected None"):
        open_writer(folder, **options | {"by_target": False})


@pytest.mark.parametrize(("granularity", "total"), [("pairwise", [2.0, 5.0]), ("per_layer", [6.0, 15.0])])
def test_lists_of_scores(folder: Path, granularity: Granularity, total: list[float]) -> None:
    """A list for each row beside its total; null, as the total, where the optimizer did not step."""
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with ScoreWriter(folder, rank=0, metadata={}, granularity=granularity) as writer:
        for step, null in enumerate((False, True, False)):
            writer.append(
                ScoredStep(step, lr=0.5, clip_factor=1.0, val_loss=2.0, global_batch_size=2, null=null),
                sample_ids=[1, 2], domains=["a", "b"], blocks=[0, 1], dot_products=scores, train_losses=torch.ones(2),
            )  # fmt: skip
    table = pd.read_parquet(folder)
    assert table.dot_product.dropna().tolist() == total * 2
    assert table.value.dropna().tolist() == [each / 4 for each in total * 2]
    lists = table[granularity]
    assert [None if each is None else list(each) for each in lists] == [
        *scores.tolist(),
        None,
        None,
        *scores.tolist(),
    ]
    assert open_scores(folder).schema.equals(score_schema(granularity))
    with pytest.raises(ScoreError, match="granularity"):
        ScoreWriter(folder, rank=0, metadata={})


def test_domains_are_right_although_files_number_them_differently(folder: Path) -> None:
    with open_writer(folder, rows_per_file=1) as writer:
        for step, domains in enumerate([["a", "b"], ["b", "c"], ["c", "a"]]):
            append(writer, step, domains=domains)
            writer.flush()
    assert len(names(folder)) == 3
    assert read(folder).domain.tolist() == ["a", "b", "b", "c", "c", "a"]
    with open_writer(folder, rows_per_file=100) as writer:
        writer.merge()
    assert len(names(folder)) == 1
    assert read(folder).domain.tolist() == ["a", "b", "b", "c", "c", "a"]
    assert isinstance(read(folder).domain.dtype, pd.CategoricalDtype)


def test_append_copies_and_reads_nothing(folder: Path) -> None:
    """The engine may reuse its buffers; and to read a value would make the step wait for the device."""
    writer = open_writer(folder)
    reused = torch.tensor([1.0, 2.0], requires_grad=True)
    factor, skipped = torch.tensor(1.0), torch.tensor(False)
    append(writer, 0, dot_products=reused, train_losses=reused, clip_factor=factor, null=skipped)
    with torch.no_grad():
        reused.zero_()
    factor.zero_()
    skipped.fill_(True)
    writer.flush()
    table = read(folder)
    assert table.dot_product.tolist() == table.train_loss.tolist() == [1.0, 2.0]
    assert table.clip_factor.tolist() == [1.0, 1.0]

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")  # has no values

    append(
        writer,
        1,
        dot_products=meta(2),
        train_losses=meta(2),
        val_loss=meta(),
        clip_factor=meta(),
        null=meta(),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"domains": ["a"]},
        {"blocks": [1, 2, 3]},
        {"dot_products": torch.ones(2, 1)},
        {"train_losses": torch.ones(3)},
        {"row_weights": torch.ones(3)},
    ],
)
def test_arguments_of_different_length_are_an_error(folder: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match="one entry per sample"):
        append(open_writer(folder), 0, **changes)


def test_steps_come_in_order(folder: Path) -> None:
    writer = open_writer(folder)
    append(writer, 5)
    append(writer, 5)  # micro-batches
    with pytest.raises(ValueError, match=r"step 4 is not in order.*at step 5 already"):
        append(writer, 4)
    writer.flush()
    with pytest.raises(ValueError, match=r"step 5 is not in order.*at step 5 already.*drop_from\(5\)"):
        append(writer, 5)
    append(open_writer(folder), 6)
    with pytest.raises(ValueError, match="at step 5 already"):
        append(open_writer(folder), 5)


def test_nothing_buffered_writes_nothing(folder: Path) -> None:
    with open_writer(folder) as writer:
        writer.flush()
    assert names(folder) == []


def test_an_exception_inside_saves_what_was_appended(folder: Path) -> None:
    def run() -> None:
        with open_writer(folder) as writer:
            append(writer, 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert rows(read(folder)) == expected(range(1))


# ---- merging


def test_small_files_are_merged_as_soon_as_they_fill_one(folder: Path) -> None:
    writer = open_writer(folder, rows_per_file=6)
    for step in range(7):  # 2 rows each
        append(writer, step)
        writer.flush()
        assert rows(read(folder)) == expected(range(step + 1))
    assert [pq.read_metadata(folder / name).num_rows for name in names(folder)] == [6, 6, 2]
    append(writer, 7)
    writer.close()
    assert [pq.read_metadata(folder / name).num_rows for name in names(folder)] == [6, 6, 4]
    assert read(folder).step.tolist() == [step for step in range(8) for _ in range(2)], "sorted by step"


def test_a_later_writer_goes_on_merging(folder: Path) -> None:
    write(folder, range(4))
    assert len(names(folder)) == 2
    write(folder, range(4, 6))
    assert [pq.read_metadata(folder / name).num_rows for name in names(folder)] == [6, 6]
    assert rows(read(folder)) == expected(range(6))


def test_merging_alone_needs_two_files(folder: Path) -> None:
    write(folder, range(1))
    before = [(path.name, path.stat().st_ino) for path in folder.iterdir()]
    with open_writer(folder) as writer:
        writer.merge()
    assert [(path.name, path.stat().st_ino) for path in folder.iterdir()] == before


def test_ranks_share_a_folder_and_leave_each_other_alone(folder: Path) -> None:
    other = open_writer(folder, rank=1)
    append(other, 0)
    other.flush()
    temporary = folder.with_name(f".{folder.name}.step-000000000001-000000000001.rank-00001.parquet.tmp")
    temporary.touch()  # rank 1 is writing
    marker = folder / "merging.rank-00001.parquet"
    marker.touch()
    write(folder, range(4), rank=0)
    assert temporary.exists() and marker.exists()
    marker.unlink()
    table = read(folder)
    assert rows(table[table["rank"] == 0]) == expected(range(4))
    assert rows(table[table["rank"] == 1]) == expected(range(1))
    open_writer(folder, rank=0).drop_from(0)
    assert set(read(folder)["rank"]) == {1}


def test_another_rank_may_take_a_file_away_while_the_folder_is_listed(folder: Path, monkeypatch) -> None:
    write(folder, range(1), rank=1)
    monkeypatch.setattr(pq, "read_schema", raising(FileNotFoundError(errno.ENOENT, "gone")))
    open_writer(folder, rank=0)
    with pytest.raises(AssertionError):
        open_writer(folder, rank=1)


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


# ---- dropping


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 8, 9])
def test_drop_from(folder: Path, step: int) -> None:
    write(folder, range(8))
    writer = open_writer(folder)
    writer.drop_from(step)
    if step > 0:
        assert rows(read(folder)) == expected(range(min(step, 8)))
        assert all(FILE_NAME.fullmatch(name) for name in names(folder))
    else:
        assert names(folder) == []
    append(writer, min(step, 8))
    writer.close()
    assert rows(read(folder)) == expected(range(min(step, 8) + 1))


# ---- crashes


class Crash(BaseException):
    """The process was killed."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """crash_at(k): the k-th operation on the disk fails, and all after it do: nothing cleans up.

    crash_at(None): the machine works again.
    """
    left: list[int | None] = [None]

    def guarded(function: Callable, before: Callable[..., None] = lambda *_: None) -> Callable:
        def call(*arguments, **options):
            if left[0] is not None:
                if left[0] == 0:
                    before(*arguments)
                    raise Crash
                left[0] -= 1
            return function(*arguments, **options)

        return call

    def torn(table: pa.Table, sink, **_: object) -> None:
        sink.write(b"PAR1 and some")

    for owner, name in ((os, "replace"), (os, "unlink"), (Path, "open"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    monkeypatch.setattr(
        os, "fsync", guarded(lambda _: None)
    )  # slow, and without effect unless the power fails
    monkeypatch.setattr(pq, "write_table", guarded(pq.write_table, before=torn))

    def set_point(k: int | None) -> None:
        left[0] = k

    yield set_point
    set_point(None)


def survives(folder: Path, *allowed: list[tuple[int, float]]) -> None:
    """open_scores() is right, pandas is right or stops with an error, and a new writer puts all in order."""
    if not folder.exists():
        assert [] in allowed
        return
    files = [name for name in names(folder) if FILE_NAME.fullmatch(name)]
    found = rows(open_scores(folder).to_table()) if files else []
    assert found in allowed
    if (folder / "merging.rank-00000.parquet").exists():
        with pytest.raises(pa.ArrowInvalid, match=r"merging\.rank-00000\.parquet"):
            read(folder)
    elif files:
        assert rows(read(folder)) == found
    open_writer(folder)
    if files:
        assert rows(read(folder)) == found
    assert all(FILE_NAME.fullmatch(name) for name in names(folder))
    assert names(folder.parent) == [folder.name], "temporary files are gone"


def test_no_crash_loses_or_doubles_a_row_in_writing_and_merging(folder: Path, crash_at) -> None:
    last, k, crashes = 7, 0, 0
    while True:
        done = 0
        crash_at(k)
        try:
            writer = open_writer(folder)
            for step in range(last):
                append(writer, step)
                writer.flush()
                done = step + 1
            writer.close()
        except Crash:
            crash_at(None)
            crashes += 1
            survives(folder, expected(range(done)), expected(range(done + 1)))
        else:
            break
        with open_writer(folder) as writer:  # the run is repeated from what is there
            start = len(rows(read(folder))) // 2 if names(folder) else 0
            for step in range(start, last):
                append(writer, step)
        assert rows(read(folder)) == expected(range(last))
        for name in names(folder):
            (folder / name).unlink()
        folder.rmdir()
        k += 1
    assert crashes > 50


def test_no_crash_loses_or_doubles_a_row_in_dropping(folder: Path, crash_at) -> None:
    crashes = 0
    while True:
        open_writer(folder).drop_from(0)
        write(folder, range(8))
        crash_at(crashes)
        try:
            open_writer(folder).drop_from(4)
        except Crash:
            crash_at(None)
            crashes += 1
            survives(folder, *(expected(range(end)) for end in range(4, 9)))
            open_writer(folder).drop_from(4)
            assert rows(read(folder)) == expected(range(4))
        else:
            break
    assert crashes > 15


def test_recover_puts_all_ranks_in_order(folder: Path, crash_at) -> None:
    for rank in (0, 1):
        write(folder, range(2), rank=rank, rows_per_file=1)
    for rank in (0, 1):
        writer = open_writer(folder, rank=rank, rows_per_file=100)
        crash_at(9)
        with pytest.raises(Crash):
            writer.merge()
        crash_at(None)
    assert len([name for name in names(folder) if name.startswith("merging")]) == 2, (
        "crashed at the worst moment"
    )
    recover(folder)
    found = [FILE_NAME.fullmatch(name) for name in names(folder)]
    assert [match and match.group(3) for match in found] == ["00000", "00001"]
    assert rows(read(folder)) == sorted(expected(range(2)) * 2)


def test_disk_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a power failure: a file is synced before it appears, and has appeared for good before others go."""
    write(folder, range(2), rows_per_file=1)
    done: list[str] = []

    def noted(name: str) -> Callable:
        function = getattr(os, name)

        def call(*arguments):
            synced_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            done.append(name + " folder" * synced_folder)
            return function(*arguments)

        return call

    writer = open_writer(folder, rows_per_file=100)
    for name in ("replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, noted(name))
    writer.merge()
    put_in_order = ["fsync folder", "unlink"]  # the second of a marker, which is not there
    marker = ["fsync", "fsync folder"]
    switch = ["replace", "fsync folder", "unlink", "unlink", "fsync folder", "unlink"]
    assert done == [*put_in_order, "fsync", *marker, *switch, *put_in_order]


def test_a_full_disk_raises_and_leaves_the_earlier_files_whole(folder: Path) -> None:
    writer = open_writer(folder)
    append(writer, 0)
    writer.flush()
    append(writer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ScoreError, match=r"files that were there before are whole.*File too large"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder.parent) == [folder.name], "the unfinished file does not keep its space"
    assert rows(read(folder)) == expected(range(1))
    writer.flush()
    assert rows(read(folder)) == expected(range(2)), "the rows were still buffered"


# ---- what does not belong into the folder


def test_another_run_is_an_error_for_writer_and_reader(folder: Path, tmp_path: Path) -> None:
    write(folder, range(2))
    other = RUN | {"run": "b"}
    for rank in (0, 1):
        with pytest.raises(ScoreError, match="has run 'a', expected 'b'"):
            open_writer(folder, rank=rank, run=other)
    with pytest.raises(ScoreError, match="has more None, expected '1'"):
        open_writer(folder, run=RUN | {"more": "1"})
    assert rows(read(folder)) == expected(range(2))

    write(tmp_path / "other", range(2, 4), run=other, rank=1)
    for path in (tmp_path / "other").iterdir():
        path.rename(folder / path.name)
    with pytest.raises(ScoreError, match="has run 'b', expected 'a'"):
        open_scores(folder)


@pytest.mark.parametrize("name", ["notes.txt", "part-0.parquet", "step-1-2.rank-0.parquet"])
def test_a_foreign_file_is_an_error_and_stays(folder: Path, name: str) -> None:
    write(folder, range(1))
    (folder / name).write_text("precious")
    for function in (open_writer, open_scores, recover):
        with pytest.raises(ScoreError, match=f"{name} is not a file of scores"):
            function(folder)
    assert (folder / name).read_text() == "precious"


def test_a_damaged_file_is_an_error(folder: Path) -> None:
    write(folder, range(1))
    (folder / names(folder)[0]).write_text("damaged")
    for function in (open_writer, open_scores):
        with pytest.raises(ScoreError, match="is not a Parquet file"):
            function(folder)


def test_two_writers_of_one_rank_are_noticed(folder: Path) -> None:
    first, second = open_writer(folder, rows_per_file=100), open_writer(folder, rows_per_file=100)
    for writer, steps in ((first, (0, 1, 2)), (second, (1, 2, 3))):
        for step in steps:
            append(writer, step)
        writer.flush()
    with pytest.raises(ScoreError, match="both have step 1: two programs wrote here"):
        open_scores(folder)


def test_another_version_of_the_format_is_an_error(folder: Path) -> None:
    write(folder, range(1))
    path = folder / names(folder)[0]
    table = pq.ParquetFile(path).read()
    metadata = {**table.schema.metadata, b"format_version": b"6"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ScoreError, match="has format_version '6', expected '5'"):
        open_scores(folder)
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(ScoreError, match="has format None"):
        open_scores(folder)


def test_no_scores_is_an_error(folder: Path) -> None:
    with pytest.raises(ScoreError, match="is not a folder of scores"):
        open_scores(folder)
    folder.mkdir(parents=True)
    with pytest.raises(ScoreError, match="has no scores yet"):
        open_scores(folder)


# ---- reading


def test_open_scores_streams_and_filters(folder: Path) -> None:
    write(folder, range(8))
    scores = open_scores(folder)
    assert scores.schema.equals(SCORE_SCHEMA)
    assert scores.schema.metadata[b"run"] == b"a"
    assert scores.count_rows() == 16
    assert scores.to_table(filter=pc.field("step") == 3)["dot_product"].to_pylist() == pytest.approx([3, 3.1])
