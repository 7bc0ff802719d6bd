"""Any tokenizer: what its file says, the shards it makes, and the tools on them."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import start
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from attribution.query.text_search import find_documents
from data_processing.shards import GPT2_BYTES_IDS, ShardWriter, list_shards, open_shard
from data_processing.tokenize_pile import main, tokenize
from data_processing.tokenizer_files import FileTokenizer, open_tokenizer, same_tokenizer, tokenizer_of
from data_processing.tokenizers import TokenizerError
from data_processing.train_tokenizer import train_tokenizer

TEXTS = (
    "The cat sat on the mat.", "naïve café 北京 🙂 \n\t end", "<|endoftext|> is ordinary text here", "  two  spaces ",
    "cat cat cat",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    records = [{"text": text, "meta": {"pile_set_name": "A"}} for text in TEXTS * 20]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([corpus], 300, folder)
    return folder


def shards_of(corpus: Path, output: Path, tokenizer: Path, **given: Any) -> Path:
    for split in ("train", "val", "test"):
        tokenize([corpus], split=split, output_dir=output, tokenizer=str(tokenizer), num_workers=1, **given)
    return output


def large(folder: Path) -> Path:
    """A byte-level vocabulary of 70,000 ids, of which the words are the last ones, with a begin-of-text token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    vocabulary |= {f"filler{place}": place for place in range(len(letters), 69_998)}
    library = Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("</s>"), AddedToken("<s>")])
    begin = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    return folder


@pytest.mark.parametrize("text", [*TEXTS, "\x00", " " * 1000 + "x"])
def test_a_text_comes_back(trained: Path, text: str) -> None:
    tokenizer = FileTokenizer.load(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text and tokenizer.ids.end_of_text not in ids
    (again,) = tokenizer.encode_batch([text])
    assert again.tolist() == ids.tolist() and ids.dtype == np.dtype("<u2")
    assert b"".join(tokenizer.token_bytes()[each] for each in ids) == text.encode()
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text).tolist() == ids.tolist()


def test_training_is_deterministic_and_transformers_reads_it(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    train_tokenizer([corpus], 300, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    other = AutoTokenizer.from_pretrained(trained)
    assert other.eos_token == "<|endoftext|>"
    assert other.encode(TEXTS[0]) == FileTokenizer.load(trained).encode(TEXTS[0]).tolist()


def test_shards_say_what_made_them_and_carry_it(trained: Path, corpus: Path, tmp_path: Path) -> None:
    data = shards_of(corpus, tmp_path / "data", trained)
    (shard,) = list_shards(data, "train")
    tokenizer = FileTokenizer.load(trained)
    assert (
        shard.ids == tokenizer.ids
        and shard.ids.tokenizer.startswith("sha256:")
        and shard.ids.vocabulary == 300
    )
    want = [[*tokenizer.encode(text).tolist(), shard.ids.end_of_text] for text in TEXTS * 20]
    assert shard.tokens.tolist() == [token for document in want for token in document]
    found = tokenizer_of(shard.ids, data)
    assert found.decode(shard.tokens[:5].tolist()) == tokenizer.decode(want[0][:5])
    assert (
        tokenize([corpus], split="train", output_dir=data, tokenizer=str(trained), num_workers=1).documents
        == 100
    )
    (file,) = data.glob("tokenizer-*.json")
    file.rename(tmp_path / "elsewhere.json")
    with pytest.raises(TokenizerError, match=f"{file}, the tokenizer of the shards there, is missing"):
        tokenizer_of(shard.ids, data)


def test_more_ids_than_uint16_holds_and_a_beginning_of_texts(corpus: Path, tmp_path: Path) -> None:
    folder = large(tmp_path / "large")
    data = shards_of(corpus, tmp_path / "data", folder)
    (shard,) = list_shards(data, "train")
    assert (shard.ids.end_of_text, shard.ids.begin_of_text) == (69_998, 69_999)
    assert shard.tokens.dtype == np.dtype("<u4") and shard.max_token_id == 69_999
    starts = shard.document_starts
    assert (shard.tokens[starts] == 69_999).all() and (shard.tokens[starts[1:] - 1] == 69_998).all()
    places = list(find_documents([shard], "café 北京", tokenizer_of(shard.ids, data)))
    assert [place.document for place in places] == list(range(1, 100, 5))
    run = start(data, tmp_path, run_name="a", batch_size=2, max_steps=2, block_size=8)
    assert run.status == 2 and "have token id 69999, the model's vocabulary ends at 50303" in run.err


def test_shards_of_the_first_version_open_as_before(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "A", split="train", ids=GPT2_BYTES_IDS) as writer:
        writer.append([1, 2, 3])
    path = tmp_path / "A.json"
    fields = json.loads(path.read_text())
    for name in ("vocabulary", "end_of_text", "begin_of_text", "token_type"):
        del fields[name]
    path.write_text(json.dumps(fields | {"format_version": 1}))
    shard = open_shard(path)
    assert shard.ids == GPT2_BYTES_IDS and shard.tokens.tolist() == [1, 2, 3, 50256]


def without_end(folder: Path) -> str:
    (folder / "tokenizer_config.json").unlink()
    return "nothing says which token ends a text"


def not_json(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return "tokenizer.json is no tokenizer of Hugging Face's format"


def gone(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json; name a tokenizer.json, or a folder that has one"


def unknown_end(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</end>"}')
    return "has no token '</end>'"


def ordinary_end(folder: Path) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token = tokenizer.encode(TEXTS[0]).tokens[0]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    return "which stands for the end or the beginning of a text, from the text"


@pytest.mark.parametrize("damage", [without_end, not_json, gone, unknown_end, ordinary_end])
def test_a_tokenizer_that_cannot_be_used_is_one_line(
    damage: Callable[[Path], str],
    trained: Path,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(trained, tmp_path / "t")
    message = damage(folder)
    given = ["--input", str(corpus), "--split", "train", "--output_dir", str(tmp_path / "out")]
    assert main([*given, "--tokenizer", str(folder), "--num_workers", "1"]) == 1
    assert message in caplog.text and "\n" not in caplog.records[-1].getMessage()


def test_flags_name_the_ends(trained: Path, corpus: Path, tmp_path: Path) -> None:
    bare = trained / "tokenizer.json"
    data = shards_of(corpus, tmp_path / "data", bare, end_of_text="<|endoftext|>", begin_of_text="~")
    (shard,) = list_shards(data, "val")
    begin = FileTokenizer.load(trained).encode("~")[0]
    assert shard.ids.begin_of_text == begin and (shard.tokens[shard.document_starts] == begin).all()
    with pytest.raises(TokenizerError, match="are for tokenizers in files"):
        open_tokenizer("gpt2_bytes", end_of_text="a")
    with pytest.raises(TokenizerError, match="neither one of gpt2, gpt2_bytes nor"):
        open_tokenizer("gpt3")


def test_a_models_own_tokenizer_must_have_made_the_shards(
    trained: Path, corpus: Path, data: Path, tmp_path: Path
) -> None:
    shards = shards_of(corpus, tmp_path / "shards", trained)
    config = LlamaConfig(
        vocab_size=50304, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    flags: dict[str, Any] = {"architecture": "auto", "init_from": model, "max_steps": 1, "block_size": 8}
    shutil.copy(trained / "tokenizer.json", model)
    assert start(shards, tmp_path, run_name="a", **flags).status == 0
    run = start(data, tmp_path, run_name="b", **flags)
    assert run.status == 2 and "the shards were made by gpt2_bytes" in run.err
    assert (
        same_tokenizer(model, open_tokenizer(str(trained)).ids)
        and same_tokenizer(tmp_path, GPT2_BYTES_IDS) is None
    )
    run = start(data, tmp_path, run_name="c", architecture="auto", init_from=model, block_size=17)
    assert run.status == 2 and "--block_size 17 is longer than the 16 positions" in run.err
