"""The demo corpus: every domain in every split, the same each time, and nothing to do the second time."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from run_helpers import tree

from data_processing import demo_corpus
from data_processing.demo_corpus import (
    DOCUMENT_BYTES,
    DOMAIN_BYTES,
    DOMAINS,
    SPLIT_BYTES,
    DemoError,
    choose_documents,
    deal_documents,
    main,
    make_demo,
    read_python_docs,
    write_corpus,
)
from data_processing.shards import list_shards
from data_processing.tokenize_pile import SPLITS, tokenize
from data_processing.tokenizers import get_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert main(["--output_dir", str(folder)]) == 0
    return folder


def records(demo: Path, split: str) -> list[dict]:
    with (demo / "jsonl" / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_split_has_enough_blocks_of_every_domain(demo: Path) -> None:
    for split in SPLITS:
        shards = list_shards(demo, split)
        assert [shard.domain for shard in shards] == sorted(DOMAINS)
        for shard in shards:
            assert shard.tokenizer == "gpt2_bytes"
            assert shard.num_tokens > 15 * 1024
        total = sum(shard.num_tokens for shard in shards)
        assert total < (6_000_000 if split == "train" else 1_000_000)


def test_the_shards_hold_the_text_of_the_corpus(demo: Path) -> None:
    tokenizer = get_tokenizer("gpt2_bytes")
    for shard in list_shards(demo, "val"):
        texts = [
            record["text"]
            for record in records(demo, "val")
            if record["meta"]["pile_set_name"] == shard.domain
        ]
        assert tokenizer.decode(shard.tokens.tolist()) == "".join(text + "<|endoftext|>" for text in texts)


def test_no_document_is_in_two_splits(demo: Path) -> None:
    texts = [record["text"] for split in SPLITS for record in records(demo, split)]
    assert len(set(texts)) == len(texts) > 100
    assert max(len(text.encode()) for text in texts) <= DOCUMENT_BYTES


def test_the_corpus_is_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "again")
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / "again" / name).read_bytes() == (demo / "jsonl" / name).read_bytes()


def test_the_second_time_there_is_nothing_to_do(demo: Path) -> None:
    before = tree(demo)
    make_demo(demo)
    assert tree(demo) == before


def test_it_goes_on_after_an_interruption(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def interrupted(*arguments: object, split: str, **options: object) -> None:
        if split == "val" and made.count("val") == 0:
            made.append(split)
            raise KeyboardInterrupt
        made.append(split)
        tokenize(*arguments, split=split, **options)  # type: ignore[arg-type]

    (tmp_path / "jsonl.partial").mkdir()  # what an interruption of write_corpus leaves
    monkeypatch.setattr(demo_corpus, "tokenize", interrupted)
    assert main(["--output_dir", str(tmp_path)]) == 130
    assert made == ["train", "val"]
    written = tree(tmp_path / "jsonl")
    assert main(["--output_dir", str(tmp_path)]) == 0
    assert tree(tmp_path / "jsonl") == written
    for split in SPLITS:
        expected = [shard.checksum for shard in list_shards(demo, split)]
        assert [shard.checksum for shard in list_shards(tmp_path, split)] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jsonl", "test", "train", "val"]


def test_shards_of_something_else_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "x", "meta": {"pile_set_name": "ArXiv"}}))
    for split in SPLITS:
        tokenize([path], split=split, output_dir=tmp_path, tokenizer="gpt2_bytes", num_workers=1)
    with pytest.raises(DemoError, match="holds shards of ArXiv, not of the demo corpus"):
        make_demo(tmp_path)
    assert main(["--output_dir", str(tmp_path)]) == 1


def test_built_in_docstrings_suffice_without_the_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = sum(map(len, choose_documents(read_python_docs())))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    texts = choose_documents(read_python_docs())
    assert sum(map(len, texts)) < everything
    assert all(deal_documents("Python Docs", texts).values())


def test_documents_are_distinct_limited_and_in_an_order_of_their_own() -> None:
    generator = random.Random(0)
    texts = [f"{number}\n" + "line é\n" * generator.randrange(2000) for number in range(500)]
    texts += [texts[0], "", " \n", "x" * 2 * DOCUMENT_BYTES, "line é\n" * DOCUMENT_BYTES]
    kept = choose_documents(iter(texts))
    assert len(set(kept)) == len(kept)
    assert all(text.strip() for text in kept)
    assert DOMAIN_BYTES - DOCUMENT_BYTES <= sum(len(text.encode()) for text in kept) <= DOMAIN_BYTES
    generator.shuffle(texts)
    assert choose_documents(iter(texts)) == kept
    assert choose_documents(iter(["x" * 2 * DOCUMENT_BYTES])) == ["x" * DOCUMENT_BYTES]
    (cut,) = choose_documents(iter(["line é\n" * DOCUMENT_BYTES]))
    assert cut.endswith("line é\n")
    assert DOCUMENT_BYTES - 8 < len(cut.encode()) <= DOCUMENT_BYTES
    (cut,) = choose_documents(iter(["é" * DOCUMENT_BYTES + "x"]))
    assert set(cut) == {"é"}


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(DemoError, match=r"domain 'Licences': .* 40000 bytes of text"):
        deal_documents("Licences", ["x" * 1000] * 40)
    dealt = deal_documents("Licences", ["x" * 1000] * 500)
    sizes = {split: sum(map(len, texts)) for split, texts in dealt.items()}
    assert sizes == {"train": 400_000, "val": 50_000, "test": 50_000}
    assert (
        min(sum(map(len, texts)) for texts in deal_documents("A", ["x" * 1000] * 60).values()) >= SPLIT_BYTES
    )
