"""The samples that a run keeps beside its scores."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attribution.samples import NoSuchSampleError, RecordSamples
from score_store.samples import SCHEMA_1, Sample, open_samples, write_samples
from score_store.schema import ScoreError

SAMPLES = [
    Sample(3, "one two", [5, 6, 7], "A", {"image": "a/1.png"}),
    Sample(1 << 40, "two", [8], "B"),
]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", SAMPLES)
    (tmp_path / "images" / "a").mkdir(parents=True)
    names = ("A", "B")
    samples = RecordSamples(open_samples(tmp_path / "samples"), names, names, tmp_path / "images")
    first = samples.excerpt("A", 3, 1)
    assert (first.text, first.tokens) == ("one two", 3) and samples.excerpt("B", 0, 1).text == "two"
    assert samples.containing("two", 1) == ([("A", 3)], 2) and samples.containing("three", 1) == ([], 0)
    assert samples.image("B", 0) is None
    with pytest.raises(
        ScoreError, match=r"a/1\.png is missing: name the folder that has images/ with --pile_data_dir"
    ):
        samples.image("A", 3)
    (tmp_path / "images" / "a" / "1.png").touch()
    assert samples.image("A", 3) == tmp_path / "images" / "a" / "1.png"
    for domain, number in (("C", 0), ("B", 1)):
        with pytest.raises(NoSuchSampleError, match="there is no"):
            samples.excerpt(domain, number, 1)


def test_an_id_with_two_contents_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="sample id 3 is there with two contents: 'one two', group A; and"):
        write_samples(tmp_path / "samples", [SAMPLES[0], replace(SAMPLES[0], group="B")])
    assert list(tmp_path.iterdir()) == []


def test_missing_damaged_or_foreign_samples_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    with pytest.raises(ScoreError, match="samples is missing"):
        open_samples(folder)
    write_samples(folder, SAMPLES)
    other = pq.read_table(next(folder.iterdir())).drop(["text"])
    pq.write_table(other, next(folder.iterdir()))
    with pytest.raises(ScoreError, match="holds other columns"):
        open_samples(folder)
    (next(folder.iterdir())).write_bytes(b"no parquet")
    with pytest.raises(ScoreError, match="is damaged"):
        open_samples(folder)
    shutil.rmtree(folder)


def test_the_one_part_of_version_1_is_read(tmp_path: Path) -> None:
    rows = [{name: row.columns[name] for name in SCHEMA_1.names} for row in SAMPLES]
    (tmp_path / "samples").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA_1), tmp_path / "samples" / "part-000000.parquet")
    found = open_samples(tmp_path / "samples")
    assert {name: found.read(3)[name] for name in SCHEMA_1.names} == rows[0] and len(found) == 2
