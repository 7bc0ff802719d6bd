"""The shard format: what is written is what is read, and nothing damaged or foreign is read at all."""

import gc
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_processing import shard_files
from data_processing.shard_files import BUFFER_BYTES, ShardError
from data_processing.shards import GPT2_IDS, ShardWriter, domain_file_name, list_shards, open_shard

DOCUMENTS = [[1, 2, 3], [50255], [7] * 10]


def write_shard(folder: Path, domain: str = "Pile-CC", split: str = "train", tokenizer: str = "gpt2") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, domain, split=split, ids=replace(GPT2_IDS, tokenizer=tokenizer)) as shard:
        for document in DOCUMENTS:
            shard.append(document)
    return folder / f"{domain_file_name(domain)}.json"


def test_a_written_shard_reads_back(tmp_path: Path) -> None:
    shard = open_shard(write_shard(tmp_path, "Wikipedia (en)"), verify_checksum=True)
    expected = [token for document in DOCUMENTS for token in (*document, GPT2_IDS.end_of_text)]
    assert (shard.domain, shard.split, shard.tokenizer) == ("Wikipedia (en)", "train", "gpt2")
    assert (shard.num_tokens, shard.num_documents, shard.max_token_id) == (
        len(expected),
        3,
        GPT2_IDS.end_of_text,
    )
    assert shard.tokens.tolist() == expected
    assert shard.document_starts.tolist() == [0, 4, 6]
    assert not shard.tokens.flags.owndata and not shard.tokens.flags.writeable  # mapped
    assert (tmp_path / "Wikipedia (en).bin").read_bytes() == np.array(expected, "<u2").tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Wikipedia (en).bin",
        "Wikipedia (en).idx",
        "Wikipedia (en).json",
    ]


def test_extend_and_append_write_the_same_bytes(tmp_path: Path) -> None:
    appended = write_shard(tmp_path / "a")
    (tmp_path / "b").mkdir()
    chunks = [
        np.array([*DOCUMENTS[0], GPT2_IDS.end_of_text, *DOCUMENTS[1], GPT2_IDS.end_of_text], "<u2"),
        np.array([*DOCUMENTS[2], GPT2_IDS.end_of_text], "<u2"),
    ]
    with ShardWriter(tmp_path / "b", "Pile-CC", split="train", ids=GPT2_IDS) as shard:
        for chunk in chunks:
            shard.extend(chunk)
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == appended.with_name(path.name).read_bytes()


def test_cut_documents_begin_where_they_are_said_to(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS) as shard:
        shard.extend_cut(np.array([1, 2, 3, GPT2_IDS.end_of_text, 4], "<u2"), np.array([0, 2, 4]))
        shard.extend_cut(
            np.array([5, GPT2_IDS.end_of_text], "<u2"), np.array([], np.int64)
        )  # the document goes on
        shard.append([6])
        shard.extend_cut(np.array([GPT2_IDS.end_of_text], "<u2"), np.array([0]))
    written = open_shard(tmp_path / "A.json", verify_checksum=True)
    assert written.tokens.tolist() == [
        1,
        2,
        3,
        GPT2_IDS.end_of_text,
        4,
        5,
        GPT2_IDS.end_of_text,
        6,
        GPT2_IDS.end_of_text,
        GPT2_IDS.end_of_text,
    ]
    assert written.document_starts.tolist() == [0, 2, 4, 7, 9]


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([1, GPT2_IDS.end_of_text], [1], "first document starts at 0"),
        ([1, GPT2_IDS.end_of_text], [], "first document starts at 0"),
        ([1, 2, GPT2_IDS.end_of_text], [0, 2, 1], "out of order"),
        ([1, GPT2_IDS.end_of_text], [0, 2], "out of order"),
        ([1, GPT2_IDS.end_of_text], [-1, 0], "out of order"),
        ([], [], "no tokens"),
        ([1, GPT2_IDS.end_of_text, 2], [0, 2], "without END_OF_TEXT"),
    ],
)
def test_documents_that_no_reader_would_take_are_not_written(
    tmp_path: Path, tokens: list[int], starts: list[int], message: str
) -> None:
    writer = ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS)
    with pytest.raises(AssertionError, match=message), writer as shard:
        shard.extend_cut(np.array(tokens, "<u2"), np.array(starts, np.int64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("document", [[], [GPT2_IDS.end_of_text], [-1], [70_000], [1.5], [[1, 2]]])
def test_a_document_that_is_no_list_of_token_ids_is_an_error(tmp_path: Path, document: list) -> None:
    with ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS) as shard:
        shard.append([1])
        with pytest.raises(ShardError, match=r"a document is|token ids are"):
            shard.append(document)
    assert open_shard(tmp_path / "A.json").tokens.tolist() == [1, GPT2_IDS.end_of_text]


def test_an_id_beyond_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS)
    with pytest.raises(ShardError, match="50257 is beyond"), writer as shard:
        shard.extend(np.array([50257, GPT2_IDS.end_of_text], "<u2"))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_no_files(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS) as shard:
            shard.append([1])
            assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_has_documents_and_is_never_overwritten(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS)
    with pytest.raises(ShardError, match="no document"), writer:
        pass
    path = write_shard(tmp_path)
    with pytest.raises(ShardError, match=r"Pile-CC\.json: this shard exists"):
        write_shard(tmp_path)
    open_shard(path, verify_checksum=True)


@pytest.mark.parametrize(
    "domain", ["../../evil", ".", "..", ".hidden", "/etc", "a/b", "a\n\0b", "Üñï 中", "50%"]
)
def test_no_domain_name_leaves_the_folder(tmp_path: Path, domain: str) -> None:
    folder = tmp_path / "data" / "train"
    path = write_shard(folder, domain)
    assert path.parent == folder
    assert len(list(folder.iterdir())) == 3
    assert not path.name.startswith(".")
    assert list_shards(tmp_path / "data", "train")[0].domain == domain
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("domain", ["", "x" * 1001])
def test_a_domain_that_makes_no_file_name_is_an_error(domain: str) -> None:
    with pytest.raises(ShardError, match="cannot name a shard"):
        domain_file_name(domain)


@pytest.mark.parametrize("domain", ["Я" * 34, "中" * 23, "Я" * 80, "中" * 80, "😀" * 1000, "x" * 201])
def test_long_names_in_any_script(tmp_path: Path, domain: str) -> None:
    """Names that differ in their last letter alone are other files; the JSON has the true name."""
    names = {domain, domain[:-1] + "y", domain[:-1] + "z"}
    for name in names:
        write_shard(tmp_path / "train", name)
    assert {shard.domain for shard in list_shards(tmp_path, "train")} == names
    assert max(len(path.name.encode()) for path in (tmp_path / "train").iterdir()) <= 255 - len(".partial")


def test_file_names_stay_as_they_are() -> None:
    """Shards on disks have them."""
    assert domain_file_name("Gutenberg (PG-19)") == "Gutenberg (PG-19)"
    assert domain_file_name("a/b.é:") == "a%2Fb.%C3%A9%3A"
    assert domain_file_name("..") == "%2E."
    assert domain_file_name("Я" * 33) == "%D0%AF" * 33  # 198 characters
    assert domain_file_name("x" * 200) == "x" * 200
    assert domain_file_name("x" * 201) == "x" * 100 + "%~84a0678c90937f5dcf9994d5866668da"


def test_two_domains_never_write_into_one_file(tmp_path: Path) -> None:
    """As on a file system that takes "a" for "A"."""
    with ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS) as shard:
        shard.append([1])
        with pytest.raises(
            ShardError, match=r"A\.bin\.partial: is there already.*does not distinguish from 'A'"
        ):
            ShardWriter(tmp_path, "A", split="train", ids=GPT2_IDS).__enter__()
        shard.append([2])
    assert open_shard(tmp_path / "A.json", verify_checksum=True).num_documents == 2


# Many shards, few descriptors


def open_files(folder: Path) -> int:
    """How many descriptors this process has of files in the folder."""
    paths = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return sum(path.startswith(f"{folder}/") for path in paths)


def test_writers_have_no_file_open(tmp_path: Path) -> None:
    with ExitStack() as stack:
        shards = [
            stack.enter_context(ShardWriter(tmp_path, f"{number}", split=tmp_path.name, ids=GPT2_IDS))
            for number in range(100)
        ]
        for shard in shards:
            shard.append([1])
            shard.append([2] * (BUFFER_BYTES // 4))
            shard.append([3] * (BUFFER_BYTES // 2))  # now the buffer is full
        assert open_files(tmp_path) == 0
        assert (tmp_path / "7.bin.partial").stat().st_size > BUFFER_BYTES
    for number in range(100):
        assert open_shard(tmp_path / f"{number}.json", verify_checksum=True).num_documents == 3


def test_open_shards_share_a_few_maps(tmp_path: Path) -> None:
    """Read again and again by four threads; all maps go with the shards."""
    for number in range(60):
        with ShardWriter(tmp_path, f"{number:02d}", split=tmp_path.name, ids=GPT2_IDS) as shard:
            shard.append([number] * 5)

    def read_all() -> None:
        shards = list_shards(tmp_path.parent, tmp_path.name)
        assert open_files(tmp_path) == shard_files.MAX_MAPPED
        with ThreadPoolExecutor(4) as threads:
            places = [(17 * step) % 60 for step in range(2000)]
            read = list(threads.map(lambda place: shards[place].tokens[:5].tolist(), places))
        assert read == [[place] * 5 for place in places]
        assert open_files(tmp_path) == shard_files.MAX_MAPPED

    read_all()
    gc.collect()
    assert open_files(tmp_path) == 0


def test_a_shard_that_changes_while_it_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Touched or copied back it is the same; with other content, or gone, it is an error."""
    monkeypatch.setattr(shard_files, "MAX_MAPPED", 1)
    shards = [open_shard(write_shard(tmp_path, domain)) for domain in ("A", "B")]
    path, content = tmp_path / "A.bin", (tmp_path / "A.bin").read_bytes()

    def read() -> list[int]:
        assert shards[1].tokens[0] == 1  # takes the map's place
        return shards[0].tokens[:3].tolist()

    os.utime(path, (0, 0))
    assert read() == [1, 2, 3]
    path.write_bytes(content[::-1])
    os.utime(path, (1, 1))
    with pytest.raises(ShardError, match=r"A\.bin: sha256 is"):
        read()
    path.write_bytes(content)
    os.utime(path, (2, 2))
    assert read() == [1, 2, 3]
    path.unlink()
    with pytest.raises(ShardError, match=r"A\.bin: No such file"):
        read()


def change(**fields: object) -> Callable[[Path], None]:
    """Damage: other values in the JSON; None removes the field."""
    gone = {name for name, value in fields.items() if value is None}

    def damage(path: Path) -> None:
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in content.items() if name not in gone}))

    return damage


def rewrite(suffix: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Damage: other bytes in a file."""

    def damage(path: Path) -> None:
        file = path.with_suffix(suffix)
        file.write_bytes(edit(file.read_bytes()))

    return damage


DAMAGES = {
    "truncated tokens": (rewrite(".bin", lambda data: data[:-2]), "has 32 bytes, its JSON says 34"),
    "half a token": (rewrite(".bin", lambda data: data[:-1]), "has 33 bytes"),
    "tokens too many": (rewrite(".bin", lambda data: data + data), "has 68 bytes"),
    "empty tokens": (rewrite(".bin", lambda _: b""), "has 0 bytes"),
    "truncated index": (rewrite(".idx", lambda data: data[:-8]), r"Pile-CC\.idx: has 16 bytes"),
    "another index": (rewrite(".idx", lambda data: b"\1" + data[1:]), "do not belong together"),
    "index beyond": (rewrite(".idx", lambda data: data[:-8] + b"\x7f" * 8), "do not belong together"),
    "cut document": (rewrite(".bin", lambda data: data[:-2] + b"\0\0"), "do not belong together"),
    "no tokens": (lambda path: path.with_suffix(".bin").unlink(), r"Pile-CC\.bin is missing"),
    "no index": (lambda path: path.with_suffix(".idx").unlink(), r"Pile-CC\.idx is missing"),
    "not JSON": (rewrite(".json", lambda _: b"{"), "is not the JSON of a shard"),
    "not text": (rewrite(".json", lambda _: b"\xff\xfe\xff"), "is not the JSON of a shard"),
    "another JSON": (rewrite(".json", lambda _: b"[1]"), 'no "magic"'),
    "another magic": (change(magic="numpy"), 'no "magic"'),
    "another version": (change(format_version=99), "format version 99, this code reads 1"),
    "no count": (change(num_tokens=None), "num_tokens is None, not int"),
    "count of another type": (change(num_documents="3"), "num_documents is '3', not int"),
    "no documents": (change(num_documents=0), "has 24 bytes, its JSON says 0"),
    "ids beyond": (change(max_token_id=50257), "largest token id 50257 is beyond the vocabulary of 50257"),
    "end beyond": (change(end_of_text=50257), "end_of_text 50257 and begin_of_text None do not belong"),
    "another type": (change(token_type="uint32"), "numbers' type uint32, .* do not belong together"),
    "another domain": (change(domain="ArXiv"), "holds domain 'ArXiv', its file name says another"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_shard_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    path = write_shard(tmp_path)
    open_shard(path)
    damage(path)
    with pytest.raises(ShardError, match=message) as error:
        open_shard(path)
    assert str(tmp_path / "Pile-CC.") in str(error.value)


@pytest.mark.parametrize("name", ["", "Pile-CC.json"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """A link to itself is refused to root as well, as a folder without rights is to others."""
    path = write_shard(tmp_path / "train") if name else tmp_path / "train"
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
    with pytest.raises(ShardError, match=f"{path}: Too many levels of symbolic links"):
        list_shards(tmp_path, "train")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_checksums_find_what_sizes_do_not(tmp_path: Path, suffix: str) -> None:
    path = write_shard(tmp_path)
    rewrite(suffix, lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:])(path)
    open_shard(path)
    with pytest.raises(ShardError, match=rf"Pile-CC\{suffix}: sha256 is"):
        open_shard(path, verify_checksum=True)


def test_list_shards_sorts_by_domain(tmp_path: Path) -> None:
    for domain in ("b", "A", "a/", "é"):
        write_shard(tmp_path / "val", domain, split="val")
    assert [shard.domain for shard in list_shards(tmp_path, "val")] == ["A", "a/", "b", "é"]


def test_a_missing_split_names_the_commands_and_the_splits_that_are_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "val", split="val")
    (tmp_path / "empty").mkdir()
    for split in ("train", "empty"):
        with pytest.raises(ShardError, match=rf"'{split}' in {tmp_path} \(splits there: val\)") as error:
            list_shards(tmp_path, split)
        assert "python -m data_processing.tokenize_pile" in str(error.value)
        assert "python -m data_processing.demo_corpus" in str(error.value)


def test_names_that_begin_with_a_dot_are_skipped(tmp_path: Path) -> None:
    """As macOS leaves them beside files on other file systems."""
    write_shard(tmp_path / "val", "A", split="val")
    for name in ("._A.json", "._A.bin", ".ipynb_checkpoints"):
        (tmp_path / "val" / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / ".copy").mkdir()
    (tmp_path / ".copy" / "A.json").write_bytes(b"")
    assert [shard.domain for shard in list_shards(tmp_path, "val")] == ["A"]
    with pytest.raises(ShardError, match=r"\(splits there: val\)"):
        list_shards(tmp_path, "train")


def test_list_shards_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    write_shard(tmp_path / "test", "A", split="test")
    (tmp_path / "test" / "B.bin").write_bytes(b"\0\0")
    with pytest.raises(ShardError, match=r"B\.bin: has no B\.json"):
        list_shards(tmp_path, "test")
    (tmp_path / "test" / "B.bin").unlink()
    write_shard(tmp_path / "test", "B", split="test", tokenizer="gpt2_bytes")
    with pytest.raises(ShardError, match=r"A\.json has tokenizer 'gpt2', B\.json 'gpt2_bytes'"):
        list_shards(tmp_path, "test")
    (tmp_path / "test").rename(tmp_path / "train")
    with pytest.raises(ShardError, match="made for split 'test', but lies in 'train'"):
        list_shards(tmp_path, "train")
