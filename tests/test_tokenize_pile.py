"""tokenize_pile: the right tokens in the right order, whatever goes wrong on the way."""

import bz2
import fcntl
import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from data_processing import pile_records, progress, split_parts, tokenize_pile
from data_processing.batch_encoder import BatchEncoder, Counts
from data_processing.input_files import InputFile, PileError, find_inputs
from data_processing.pile_records import BadRecord, LineBatch, number_lines, parse_record, read_line_batches
from data_processing.shards import GPT2_BYTES_IDS, GPT2_IDS, list_shards
from data_processing.tokenize_pile import main, tokenize
from data_processing.tokenizers import get_tokenizer
from data_processing.worker_pool import WorkerError, WorkerPool

Record = tuple[str, str]  # domain, text
RECORDS: list[Record] = [
    (("ArXiv", "Wikipedia (en)", "../x")[number % 3], f"Document {number}, naïve 中😀\n" * (number % 5 + 1))
    for number in range(60)
]


def as_line(record: Record) -> bytes:
    domain, text = record
    content = {"text": text, "meta": {"pile_set_name": domain, "other": 1}}
    return json.dumps(content, ensure_ascii=len(text) % 2 == 0).encode()


def write_jsonl(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(as_line(record) for record in records))
    return path


def run(inputs: list[Path], output_dir: Path, **options: object) -> Counts:
    settings = {"split": "train", "tokenizer": "gpt2_bytes", "num_workers": 1} | options
    return tokenize(inputs, output_dir=output_dir, **settings)  # type: ignore[arg-type]


def expected_tokens(records: list[Record]) -> dict[str, list[int]]:
    tokenizer = get_tokenizer("gpt2_bytes")
    tokens: dict[str, list[int]] = {}
    for domain, text in records:
        tokens.setdefault(domain, []).extend([*tokenizer.encode(text).tolist(), GPT2_IDS.end_of_text])
    return tokens


def tokens_in(output_dir: Path, split: str = "train") -> dict[str, list[int]]:
    return {shard.domain: shard.tokens.tolist() for shard in list_shards(output_dir, split)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What comes out


def test_plain_gzip_and_zstd_files_of_a_folder_in_order(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "in" / "b.jsonl", RECORDS[20:40])
    lines = [as_line(record) + b"\r\n" for record in RECORDS]
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(
        gzip.compress(b"".join(lines[:10])) + gzip.compress(b"".join(lines[10:20]))
    )
    (tmp_path / "in" / "sub").mkdir()
    with (tmp_path / "in" / "sub" / "c.jsonl.zst").open("wb") as file:
        for frame in (lines[40:50], lines[50:60]):
            file.write(pa.compress(b"".join(frame), codec="zstd", asbytes=True))
    (tmp_path / "in" / "README.md").write_text("not an input")

    counts = run([tmp_path / "in"], tmp_path / "out")

    assert tokens_in(tmp_path / "out") == expected_tokens(RECORDS)
    assert counts.documents == 60
    assert counts.tokens == sum(len(tokens) for tokens in tokens_in(tmp_path / "out").values())
    assert counts.text_bytes == sum(len(text.encode()) for _, text in RECORDS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"]
    assert plain.exists()
    for shard in list_shards(tmp_path / "out", "train"):
        documents = [text for domain, text in RECORDS if domain == shard.domain]
        starts = itertools.accumulate([len(text.encode()) + 1 for text in documents[:-1]], initial=0)
        assert shard.document_starts.tolist() == list(starts)


@pytest.fixture
def read_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are read at a time."""
    return lambda size: monkeypatch.setattr(pile_records, "BATCH_BYTES", size)


def test_the_number_of_workers_and_the_batches_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_at_once: Callable[[int], None]
) -> None:
    inputs = [
        write_jsonl(tmp_path / "1.jsonl", RECORDS[:50]),
        write_jsonl(tmp_path / "2.jsonl", RECORDS[50:]),
    ]
    run(inputs, tmp_path / "one")
    read_at_once(300)
    monkeypatch.setattr(split_parts, "JOIN_TOKENS", 100)
    run(inputs, tmp_path / "three", num_workers=3)
    assert contents(tmp_path / "one" / "train") == contents(tmp_path / "three" / "train")
    assert tokens_in(tmp_path / "three") == expected_tokens(RECORDS)


@pytest.mark.skipif(
    not {"PILE_SAMPLE_DIR", "TIKTOKEN_CACHE_DIR"} <= set(os.environ),
    reason="PILE_SAMPLE_DIR or TIKTOKEN_CACHE_DIR is not set: no sample of the Pile, or no GPT-2 vocabulary",
)
def test_the_sample_with_gpt2(tmp_path: Path) -> None:
    path = Path(os.environ["PILE_SAMPLE_DIR"]) / "pile" / "val.jsonl"
    run([path], tmp_path, split="val", tokenizer="gpt2", num_workers=2)
    records = [parse_record(line) for line in path.read_bytes().splitlines()]
    tokenizer = get_tokenizer("gpt2")
    tokens: dict[str, list[int]] = {}
    for text, domain in records:
        tokens.setdefault(domain, []).extend([*tokenizer.encode(text).tolist(), GPT2_IDS.end_of_text])
    assert tokens_in(tmp_path, "val") == tokens


def test_blank_lines_are_no_records_and_empty_texts_no_documents(tmp_path: Path) -> None:
    lines = [b"", as_line(("A", "x")), b"  \r", as_line(("A", "")), as_line(("B", ""))]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    counts = run([tmp_path / "in.jsonl"], tmp_path / "out")
    assert (counts.documents, counts.empty_texts, counts.bad_records) == (1, 2, 0)
    assert tokens_in(tmp_path / "out") == expected_tokens([("A", "x")])


def test_without_a_terminal_the_log_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", RECORDS) for name in "ab"]
    caplog.set_level("INFO")
    run(inputs, tmp_path / "out")
    size = 2 * inputs[0].stat().st_size / 1e6
    assert f"train: read {size:.1f} of {size:.1f} MB, text " in caplog.text
    assert "MB/s, 120 documents" in caplog.text


# Reading lines


def test_batches_are_whole_lines_with_their_numbers(
    tmp_path: Path, read_at_once: Callable[[int], None]
) -> None:
    lines = [b"x" * length for length in (5, 0, 70, 3, 200, 64, 63, 1, 0, 0, 9)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    (source,) = find_inputs([tmp_path / "in.jsonl"])
    for size in (1, 7, 64, 1000):
        read_at_once(size)
        batches = list(read_line_batches(source))
        assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
        assert b"".join(batch.data for batch in batches) == b"\n".join(lines)
        numbered = [line for batch in batches for line in number_lines(batch)]
        assert numbered == [(number, line) for number, line in enumerate(lines, 1) if line]
        assert max(len(batch.data) for batch in batches) < size + 202


def test_a_line_too_long_is_bad_but_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_at_once: Callable[[int], None]
) -> None:
    lines = [b"a" * 10, b"b" * 10_000, b"c" * 10, b"d" * 100, b"e" * 10_000, b"f"]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    (source,) = find_inputs([tmp_path / "in.jsonl"])
    monkeypatch.setattr(pile_records, "MAX_LINE_BYTES", 100)
    for size in (16, 101, 150):
        read_at_once(size)
        batches = list(read_line_batches(source))
        assert max(len(batch.data) for batch in batches) <= 100 + 2 * size  # the long lines are never held
        read = dict(line for batch in batches for line in number_lines(batch))
        assert list(read) == [1, 2, 3, 4, 5, 6]
        assert [read[number] for number in (1, 3, 4, 6)] == [lines[0], lines[2], lines[3], lines[5]]
        for number in (2, 5):
            with pytest.raises(BadRecord, match="longer than"):
                parse_record(read[number])


TEXT = b"".join(as_line(record) + b"\n" for record in RECORDS)
SKIPPABLE = b"\x57\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def zstd_with_window(log: int, data: bytes) -> bytes:
    """One raw block that is the last one, as `zstd --long=31` writes it without knowing the size."""
    assert len(data) < 1 << 17
    block = (len(data) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([log - 10 << 3]) + block + data


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.zst", zstd_with_window(28, TEXT)),  # zstd -d needs --long=28 for it
        ("a.jsonl.zst", zstd_with_window(31, TEXT)),
        ("a.ndjson.zstd", zstd(TEXT)),
        (
            "a.jsonl.zst",
            SKIPPABLE + zstd(TEXT[:1000]) + SKIPPABLE + zstd(b"") + zstd(TEXT[1000:]) + SKIPPABLE,
        ),
        ("a.ndjson.gz", gzip.compress(TEXT[:1000]) + gzip.compress(b"") + gzip.compress(TEXT[1000:])),
        ("a.jsonl.gz", gzip.compress(TEXT[:1000]) + bytes(999) + gzip.compress(TEXT[1000:]) + bytes(512)),
        ("a.ndjson", b"\xef\xbb\xbf" + TEXT),
        ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + TEXT)),
    ],
)
@pytest.mark.parametrize("batch_bytes", [1, 1 << 20])
def test_what_zstd_and_gzip_read_is_read(
    tmp_path: Path, read_at_once: Callable[[int], None], name: str, data: bytes, batch_bytes: int
) -> None:
    read_at_once(batch_bytes)
    (tmp_path / name).write_bytes(data)
    (source,) = find_inputs([tmp_path])
    assert b"".join(batch.data for batch in read_line_batches(source)) == TEXT


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl.gz", gzip.compress(TEXT)[:-20], "ends in the middle of its gzip data"),
        ("a.jsonl.gz", gzip.compress(TEXT)[:-4], "ends in the middle of its gzip data"),
        ("a.jsonl.gz", gzip.compress(TEXT) + gzip.compress(TEXT)[:6], "ends in the middle of its gzip data"),
        ("a.jsonl.zst", zstd(TEXT)[:-20], "ends in the middle of its zstd data"),
        ("a.jsonl.zst", zstd(TEXT)[:3], "ends in the middle of its zstd data"),
        ("a.jsonl.zst", zstd(TEXT) + zstd(TEXT)[:7], "ends in the middle of its zstd data"),
        ("a.jsonl.gz", b"", "is empty, which no gzip file is"),
        ("a.jsonl.zst", b"", "is empty, which no zstd file is"),
        ("a.jsonl.gz", b'{"text"', r"is not gzip data, as its name says, but begins with b'\{\"text\"'"),
        (
            "a.jsonl.zst",
            b"version https://git-lfs",
            "is not zstd data, .* begins with b'version https://git-lfs'",
        ),
        ("a.jsonl.zst", gzip.compress(TEXT), r"holds gzip data, .*; let its name end in \.gz"),
        ("a.jsonl.gz", SKIPPABLE + zstd(TEXT), r"holds zstd data, .*; let its name end in \.zst"),
        ("a.jsonl", zstd(TEXT), r"holds zstd data, .*; let its name end in \.zst"),
        ("a.jsonl.gz", bz2.compress(TEXT), "holds bzip2 data, .*; decompress it first"),
        ("a.jsonl.gz", gzip.compress(TEXT)[:-5] + b"\0" * 5, "CRC check failed .*: it is damaged or"),
        (
            "a.jsonl.gz",
            gzip.compress(TEXT) + b"rest",
            "Not a gzipped file .*: it is .* followed by something else",
        ),
        ("a.jsonl.zst", zstd(TEXT) + b"rest", "Unknown frame .*: it is .* followed by something else"),
        (
            "a.jsonl.zst",
            zstd(TEXT)[:30] + b"\0" * 30 + zstd(TEXT)[60:],
            "corruption detected: it is damaged or",
        ),
        (
            "a.jsonl.zst",
            b"\x28\xb5\x2f\xfd\x01\x58\x05" + zstd(TEXT)[6:],
            "Dictionary .*: it needs the dictionary",
        ),
        ("a.jsonl", TEXT.decode().encode("utf-16"), "is UTF-16 text, .*iconv --from-code UTF-16 "),
        ("a.jsonl", TEXT.decode().encode("utf-16-be"), "is UTF-16-BE text"),
        ("a.jsonl.zst", zstd(TEXT.decode().encode("utf-32")), "is UTF-32 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_the_true_reason(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PileError, match=rf"{name}: .*{reason}"):
        list(read_line_batches(InputFile.at(tmp_path / name)))


def test_too_little_memory_for_a_long_window_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_with_window(31, TEXT))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    try:
        with pytest.raises(PileError, match="not enough memory: it was packed with a long window"):
            list(read_line_batches(InputFile.at(tmp_path / "a.jsonl.zst")))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("start", [b"\0", b"\0\0\0\0", b"\xff\xfe", b"\xfe\xff"])
def test_a_bad_beginning_is_no_other_encoding(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(start + TEXT)
    counts = run([tmp_path / "a.jsonl"], tmp_path / "out", on_bad_record="skip")
    assert (counts.bad_records, counts.documents) == (1, len(RECORDS) - 1)


def test_a_truncated_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(TEXT)[:-20])
    with pytest.raises(PileError, match="ends in the middle"):
        run([tmp_path / "a.jsonl.gz"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# Which files


def test_inputs_that_are_not_there_or_not_inputs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in" / "a.jsonl", RECORDS)
    write_jsonl(tmp_path / "none" / "b.json", RECORDS)
    for name, target in (("gone", "nowhere.jsonl"), ("ring", "x.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").symlink_to(target)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for paths, message in (
        ([tmp_path / "b.jsonl"], r"b\.jsonl: no such file or folder$"),
        (
            [tmp_path / "b.json"],
            r"b\.json: the name must end in \.jsonl or \.ndjson, or one of these and \.zst",
        ),
        ([tmp_path / "none"], r"none: holds no file that ends in .*; left out: 1 \*\.json \(.*b\.json\)"),
        (
            [tmp_path / "gone"],
            r"x\.jsonl: no such file or folder, but a link to nowhere\.jsonl, which is not",
        ),
        ([tmp_path / "ring"], r"x\.jsonl: no such file or folder, but a link to x\.jsonl"),
        ([tmp_path / "pipe.jsonl"], r"pipe\.jsonl: is neither a file nor a folder"),
        ([tmp_path / ("x" * 300 + ".jsonl")], "--input .*: File name too long"),
        ([path, tmp_path / "in"], r"a\.jsonl: is given twice"),
    ):
        with pytest.raises(PileError, match=message):
            find_inputs(paths)


def test_a_folder_stands_for_what_is_not_hidden_and_the_log_names_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    names = ["b.jsonl", "a.ndjson", "._b.jsonl", ".ipynb_checkpoints/b-checkpoint.jsonl", "one.json", "notes"]
    for name in [*names, *(f"{number}.json.gz" for number in range(5))]:
        write_jsonl(folder / name, RECORDS)
    write_jsonl(elsewhere / "sub" / "c.jsonl", RECORDS)
    (elsewhere / "blob").write_bytes(zstd(TEXT))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked" / "round").symlink_to(folder)
    (folder / "again").symlink_to(elsewhere / "sub")
    (folder / "z.jsonl.zst").symlink_to(elsewhere / "blob")
    (folder / "zz.jsonl.zst").symlink_to(elsewhere / "blob")
    caplog.set_level("INFO")
    sources = find_inputs([folder])
    want = [folder / "a.ndjson", elsewhere / "sub" / "c.jsonl", folder / "b.jsonl", elsewhere / "blob"]
    assert [source.path for source in sources] == [path.resolve() for path in want]
    for source in sources:
        assert sum(batch.data.count(b'"text"') for batch in read_line_batches(source)) == len(RECORDS)
    assert [message.replace(f"{folder}/", "") for message in caplog.messages] == [
        "left out of --input: 5 *.json.gz (0.json.gz, 1.json.gz, 2.json.gz, ...), "
        "3 reached before by another name (linked/round, linked/sub, zz.jsonl.zst), "
        "2 hidden (._b.jsonl, .ipynb_checkpoints), 2 without an ending (linked/blob, notes), "
        "1 *.json (one.json)"
    ]
    hidden = find_inputs([folder / "._b.jsonl", folder / ".ipynb_checkpoints"])
    assert [source.path.name for source in hidden] == ["._b.jsonl", "b-checkpoint.jsonl"]
    assert len(caplog.messages) == 1


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "secret").mkdir(parents=True)
    list_folder = os.scandir

    def refused(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PileError, match=r"--input .*/in: .*/in/secret: Permission denied"):
        find_inputs([tmp_path / "in"])


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    source = InputFile.at(path)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(PileError, match=r"a\.jsonl: changed while it was read"):
        list(read_line_batches(source))


# Bad records

BAD_LINES = {
    b'{"text": "cut': "malformed JSON: Unterminated string",
    b'{"text": "a"} {}': "malformed JSON: Extra data at character 15",
    b"\xef\xbb\xbf{}": "malformed JSON: Unexpected UTF-8 BOM",
    b"[" * 100_000: "malformed JSON: Expecting value at character 100001",
    b"[" * 5000 + b"]" * 4999 + b"}": "malformed JSON: Expecting ',' delimiter at character 10000",
    b'{"text": "x", "n": ' + b"1" * 5000 + b"]": "malformed JSON: Expecting ',' delimiter at character 5020",
    b"[" * 5000 + b"]" * 5000: "the record is a JSON array, not an object with 'text'",
    b"1" * 5000: "the record is a JSON number",
    b'{"text": '
    + b"1" * 5000
    + b', "meta": {"pile_set_name": "A"}}': "'text' of the record is a JSON number",
    b'{"text": "caf\xe9"}': "invalid UTF-8: byte 0xe9 at position 14",
    b'{"text": "x"}'.decode().encode("utf-16"): "invalid UTF-8: byte 0xff at position 1",
    b"[1]": "the record is a JSON array, not an object with 'text'",
    b"null": "the record is a JSON null",
    b'{"meta": {"pile_set_name": "A"}}': "the record has no 'text'",
    b'{"text": 3, "meta": {"pile_set_name": "A"}}': "'text' of the record is a JSON number, not a string",
    b'{"text": ["x"], "meta": {"pile_set_name": "A"}}': "'text' of the record is a JSON array, not a string",
    b'{"text": "x"}': "the record has no 'meta'",
    b'{"text": "x", "meta": "A"}': "'meta' is a JSON string, not an object with 'pile_set_name'",
    b'{"text": "x", "meta": {}}': "'meta' has no 'pile_set_name'",
    b'{"text": "x", "meta": {"pile_set_name": null}}': "'pile_set_name' of 'meta' is a JSON null",
    b'{"text": "x", "meta": {"pile_set_name": ""}}': "domain '' cannot name a shard",
    b'{"text": "a\\ud800b", "meta": {"pile_set_name": "A"}}': r"'text' of the record holds \\ud800, half",
    b'{"text": "x", "meta": {"pile_set_name": "\\udfff"}}': r"'pile_set_name' of 'meta' holds \\udfff, half",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_record_says_what_is_wrong(line: bytes) -> None:
    with pytest.raises(BadRecord, match=BAD_LINES[line]):
        parse_record(line)


@pytest.mark.parametrize(
    "other",
    ["1" * 5000, "-" + "1" * 5000, "1e999999", "[" * 5000 + "]" * 5000, '{"text":' * 5000 + "0" + "}" * 5000,
     "NaN", "-Infinity", '"\\ud800"', '{"\\ud800": 0}'],
    ids=range(9),
)  # fmt: skip
def test_what_a_document_does_not_need_cannot_refuse_it(other: str) -> None:
    in_meta = f'{{"meta": {{"a": {other}, "pile_set_name": "A", "b": {other}}}, "text": "x\\n"}}'
    beside = f'{{"a": {other}, "text": "y", "text": "x\\n", "meta": {{"pile_set_name": "A"}}, "b": {other}}}'
    for line in (in_meta, beside):
        assert parse_record(line.encode()) == ("x\n", "A")


def with_bad_lines(path: Path) -> Path:
    """Bad records at lines 3 and 5."""
    lines = [as_line(("A", "one")), b"", b"{", as_line(("A", "two")), b"{}", as_line(("A", "three"))]
    path.write_bytes(b"\n".join(lines))
    return path


def test_a_bad_record_stops_with_file_and_line(tmp_path: Path) -> None:
    path = with_bad_lines(tmp_path / "in.jsonl")
    with pytest.raises(PileError, match=rf"{path}:3: malformed JSON.*--on_bad_record skip"):
        run([path], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_records_are_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = [with_bad_lines(tmp_path / f"{name}.jsonl") for name in "ab"]
    counts = run(inputs, tmp_path / "out", on_bad_record="skip")
    assert (counts.documents, counts.bad_records) == (6, 4)
    assert tokens_in(tmp_path / "out") == expected_tokens([("A", "one"), ("A", "two"), ("A", "three")] * 2)
    listed = (tmp_path / "out" / "train" / "bad_records.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [
        f"{path}:{line}" for path in inputs for line in (3, 5)
    ]
    assert [line.split(": ", 1)[1] for line in listed[2:]] == [
        "malformed JSON: Expecting property name enclosed in double quotes at character 2",
        "the record has no 'text'",
    ]
    assert f"left out: {listed[0]}" in caplog.text
    with pytest.raises(PileError, match="made without 4 bad records"):
        run(inputs, tmp_path / "out")


def test_inputs_without_a_document_are_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [("A", "")])
    with pytest.raises(PileError, match="no document"):
        run([path], tmp_path / "out")


def test_domains_that_are_no_domains_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_parts, "MAX_DOMAINS", 2)
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    with pytest.raises(PileError, match=r"more than 2 domains, the next is '\.\./x'"):
        run([path], tmp_path / "out")


@pytest.mark.parametrize("name", ["part", "inputs", "bad_records", "joined", "lock", "..", "CON", "a\0b"])
def test_a_domain_may_be_named_as_what_the_writer_makes(tmp_path: Path, name: str) -> None:
    domains = [
        name,
        "shards",
        "part.manifest",
        "inputs.manifest",
        "bad_records.txt",
        "a.json",
        "a.bin.partial",
    ]
    path = write_jsonl(tmp_path / "in.jsonl", [(domain, "some text") for domain in domains])
    split = join(tmp_path / "work", path)
    split_parts.publish_split(split, tmp_path / "work", tmp_path / "train", {})
    assert {shard.domain for shard in list_shards(tmp_path, "train")} == set(domains)


def join(work: Path, path: Path) -> Path:
    """One part, joined: as `tokenize` makes it, without worker processes."""
    work.mkdir()
    key = split_parts.PartKey(InputFile.at(path), "train", GPT2_BYTES_IDS)
    encoder = BatchEncoder(get_tokenizer("gpt2_bytes"))
    with split_parts.PartWriter(work, key) as writer:
        for batch in read_line_batches(key.source):
            writer.add(encoder(batch))
    part = split_parts.find_finished_part(work, key)
    assert part is not None
    return split_parts.join_parts(work, [part], split="train", ids=GPT2_BYTES_IDS)


def test_more_domains_than_files_may_be_open(tmp_path: Path, few_descriptors: None) -> None:
    records = [(f"domain {number}", f"text {number}") for number in range(split_parts.MAX_DOMAINS)]
    joined = join(tmp_path / "work", write_jsonl(tmp_path / "in.jsonl", records))
    assert len(list(joined.glob("*.json"))) == split_parts.MAX_DOMAINS


def test_a_domain_named_part_and_the_folder_that_older_versions_left(tmp_path: Path) -> None:
    """Of a part whose part.json was another's; the same command goes on."""
    path = write_jsonl(tmp_path / "in.jsonl", [("part", "some text"), ("Я" * 80, "more text")])
    work = tmp_path / "out" / ".train.work"
    folder = split_parts.PartKey(InputFile.at(path), "train", GPT2_BYTES_IDS).folder(work)
    folder.mkdir(parents=True)
    (folder / "part.json").write_text("{}")
    run([path], tmp_path / "out")
    assert tokens_in(tmp_path / "out") == expected_tokens([("part", "some text"), ("Я" * 80, "more text")])
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["train"]


# What is there already


def test_the_same_again_is_done_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    first = run([path], tmp_path / "out")
    before = contents(tmp_path / "out" / "train")
    monkeypatch.setattr(tokenize_pile, "WorkerPool", lambda *_: pytest.fail("tokenized again"))
    assert run([path], tmp_path / "out") == first
    assert contents(tmp_path / "out" / "train") == before


def test_another_split_there_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    other = write_jsonl(tmp_path / "other.jsonl", RECORDS)
    out = tmp_path / "out"
    run([path], out)
    before = contents(out / "train")
    with pytest.raises(PileError, match=rf"made of other inputs.*{path}.*remove {out / 'train'}"):
        run([path, other], out)
    with pytest.raises(PileError, match="tokenizer 'gpt2_bytes' and not 'gpt2'"):
        run([path], out, tokenizer="gpt2")
    with pytest.raises(PileError, match=r"split 'train' in .* has gpt2_bytes"):
        run([path], out, split="val", tokenizer="gpt2")
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(PileError, match="made of other inputs, or of these before they changed"):
        run([path], out)
    (out / "train" / "inputs.manifest").unlink()
    with pytest.raises(PileError, match="was not made by this command"):
        run([path], out)
    assert contents(out / "train").items() < before.items()


def test_two_processes_do_not_write_one_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    work = tmp_path / "out" / ".train.work"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(PileError, match="another process is writing split 'train'"):
            run([path], tmp_path / "out")
    run([path], tmp_path / "out")


# Interruptions


def interrupt_at(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Ctrl-C when the input file of that name is to be read; returns the list of those that were read."""
    read: list[str] = []

    def interrupted(source: InputFile) -> Iterator[LineBatch]:
        if source.path.name == name:
            raise KeyboardInterrupt
        read.append(source.path.name)
        yield from read_line_batches(source)

    monkeypatch.setattr(tokenize_pile, "read_line_batches", interrupted)
    return read


def test_finished_files_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", RECORDS[10 * n : 10 * n + 10]) for n in range(6)]
    run(inputs, tmp_path / "whole")

    interrupt_at(monkeypatch, "5.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    inputs[1].write_bytes(inputs[1].read_bytes())  # touched, so perhaps another
    read = interrupt_at(monkeypatch, "none")
    run(inputs, tmp_path / "out")
    assert "0.jsonl" not in read
    assert {"1.jsonl", "5.jsonl"} <= set(read)
    for path in (tmp_path / "whole" / "train").glob("*.bin"):
        assert (tmp_path / "out" / "train" / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def test_a_part_of_another_tokenizer_or_with_bad_records_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [
        with_bad_lines(tmp_path / "0.jsonl"),
        *(write_jsonl(tmp_path / f"{n}.jsonl", RECORDS) for n in (1, 2, 3)),
    ]
    interrupt_at(monkeypatch, "3.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "out", on_bad_record="skip")
    with pytest.raises(PileError, match=r"0\.jsonl:3"):
        run(inputs, tmp_path / "out")
    key = split_parts.PartKey(InputFile.at(inputs[1]), "train", GPT2_BYTES_IDS)
    work = tmp_path / "out" / ".train.work"
    assert split_parts.find_finished_part(work, key) is not None
    assert split_parts.find_finished_part(work, split_parts.PartKey(key.source, "train", GPT2_IDS)) is None


def live_processes(group: int) -> set[int]:
    """Processes of a group that are not zombies."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state not in "ZX":
            found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_no_process_outlives_the_command(tmp_path: Path, name: str) -> None:
    """Ctrl-C goes to the whole group, as a terminal sends it; a kill to the parent alone."""
    record = as_line(("A", "word " * 200)) + b"\n"
    (tmp_path / "in.jsonl").write_bytes(record * 50_000)  # 50 MB: seconds
    command = [sys.executable, "-m", "data_processing.tokenize_pile", "--input", str(tmp_path / "in.jsonl")]
    command += ["--split", "train", "--output_dir", str(tmp_path / "out"), "--tokenizer", "gpt2_bytes"]
    process = subprocess.Popen(
        [*command, "--num_workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )
    while not list(tmp_path.glob("out/.train.work/*/shards/A.bin.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    assert len(live_processes(process.pid)) >= 3
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, errors = process.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while live_processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert live_processes(process.pid) == set()
    if name == "SIGINT":
        assert process.returncode == 130
        assert errors.startswith("interrupted; the same command resumes")
        assert list((tmp_path / "out").iterdir()) == []


# The pool


def test_the_pool_answers_in_order_and_does_not_run_ahead() -> None:
    taken = 0

    def tasks() -> Iterator[str]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield "x" * number

    with WorkerPool(3, len) as pool:
        for number, (task, answer) in enumerate(pool.answers(tasks())):
            assert answer == len(task) == number
            assert taken <= number + 6


@pytest.mark.parametrize(("handler", "task", "status"), [(os._exit, 3, 3), (int, "no number", 1)])
def test_a_worker_that_ends_is_an_error(handler: object, task: object, status: int) -> None:
    with pytest.raises(WorkerError, match=f"ended with status {status}"), WorkerPool(2, handler) as pool:  # type: ignore[arg-type]
        list(pool.answers([task] * 8))


# The command line


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    arguments = ["--input", str(path), "--split", "val", "--output_dir", str(tmp_path / "out")]
    arguments += ["--tokenizer", "gpt2_bytes", "--num_workers", "1"]
    assert main(arguments) == 0
    assert tokens_in(tmp_path / "out", "val") == expected_tokens(RECORDS)
    assert main([*arguments, "--num_workers", "0"]) == 1
    assert main([*arguments, "--input", "nothing.jsonl"]) == 1
    for missing in ("--input", "--split", "--output_dir", "--tokenizer"):
        place = arguments.index(missing)
        with pytest.raises(SystemExit) as stop:
            main(arguments[:place] + arguments[place + 2 :])
        assert stop.value.code == 2
        assert f"required: {missing}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--token", "gpt2"])
