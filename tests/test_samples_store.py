"""The samples that a run keeps beside its scores."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from attribution.samples import StoredSamples
from score_store.samples import PART, Sample, open_samples, write_samples
from score_store.schema import ScoreError

SAMPLES = [
    Sample(3, "A", "one two", [5, 6, 7], {"image": "a/1.png"}),
    Sample(1 << 40, "B", "two", [8]),
]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", SAMPLES)
    (tmp_path / "images" / "a").mkdir(parents=True)
    samples = StoredSamples(open_samples(tmp_path / "samples"), ("A", "B"), tmp_path / "images")
    first = samples.excerpt("A", 3, 1)
    assert (first.text, first.tokens) == ("one two", 3) and samples.excerpt("B", 0, 1).text == "two"
    assert samples.find("two", 1) == ([("A", 3)], 2) and samples.find("three", 1) == ([], 0)
    assert samples.image("B", 0) is None
    with pytest.raises(
        ScoreError, match=r"a/1\.png is missing: name the folder that has images/ with --pile_data_dir"
    ):
        samples.image("A", 3)
    (tmp_path / "images" / "a" / "1.png").touch()
    assert samples.image("A", 3) == tmp_path / "images" / "a" / "1.png"
    for domain, number in (("C", 0), ("B", 1)):
        with pytest.raises(LookupError, match="there is no"):
            samples.excerpt(domain, number, 1)


def test_an_id_that_is_there_twice_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="sample id 3 is there twice"):
        write_samples(tmp_path / "samples", [SAMPLES[0], SAMPLES[0]])
    assert list(tmp_path.iterdir()) == []


def test_missing_damaged_or_foreign_samples_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    with pytest.raises(ScoreError, match="samples is missing"):
        open_samples(folder)
    write_samples(folder, SAMPLES)
    other = pq.read_table(folder / PART).drop(["text"])
    pq.write_table(other, folder / PART)
    with pytest.raises(ScoreError, match="holds other columns"):
        open_samples(folder)
    (folder / PART).write_bytes(b"no parquet")
    with pytest.raises(ScoreError, match="is damaged"):
        open_samples(folder)
    shutil.rmtree(folder)
