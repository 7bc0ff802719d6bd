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

from attribution.curate.cut_shards import cut_shard
from attribution.query.text_search import find_documents
from data_processing.input_files import PileError
from data_processing.shards import GPT2_BYTES_IDS, ShardWriter, list_shards, open_shard
from data_processing.tokenize_pile import main, tokenize
from data_processing.tokenizer_files import (
    FileTokenizer,
    open_tokenizer,
    same_tokenizer,
    token_decoder,
    tokenizer_of,
)
from data_processing.tokenizers import TokenizerError
from data_processing.train_tokenizer import main as train_main
from data_processing.train_tokenizer import train_tokenizer
from foundation.errors import UserError
from foundation.progress import progress_bar

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


# What a tokenizer puts before a text


def byte_level(folder: Path, before: str | None, extra: tuple[str, ...] = ()) -> Path:
    """A byte-level tokenizer whose post-processor puts these tokens before a text."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    library = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("</s>"), AddedToken("<s>")])
    if before is not None:
        special = [(token, library.token_to_id(token)) for token in sorted({*before.split()})]
        library.post_processor = processors.TemplateProcessing(single=f"{before} $A", special_tokens=special)
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return folder


def test_an_end_of_text_that_also_begins_texts_is_written_once(corpus: Path, tmp_path: Path) -> None:
    data = shards_of(corpus, tmp_path / "data", byte_level(tmp_path / "t", "</s>"))
    (shard,) = list_shards(data, "train")
    assert shard.ids.begin_of_text is None and shard.num_documents == 100
    assert (shard.tokens == shard.ids.end_of_text).sum() == 100
    with pytest.raises(TokenizerError, match="--begin_of_text </s>: is the end-of-text"):
        FileTokenizer.load(tmp_path / "t", begin_of_text="</s>")


def test_several_tokens_before_a_text_are_an_error(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "t", "<s> </s>")
    with pytest.raises(TokenizerError, match="not one token begins a text; name it with --begin_of_text"):
        FileTokenizer.load(folder)
    assert FileTokenizer.load(folder, begin_of_text="<s>").ids.begin_of_text == 257


# Texts that cannot be encoded


def words(folder: Path) -> Path:
    """A tokenizer of two words that knows no others."""
    library = Tokenizer(models.WordLevel({"cat": 0, "sat": 1, "</s>": 5}))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cat dog", "cannot encode a text: WordLevel error"),
        ("cat </s>", "makes id 5, which stands for the end"),
        (" \n", "the tokenizer makes no token of its text"),
    ],
)
def test_a_text_that_cannot_be_encoded_is_a_bad_record(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": each, "meta": {"pile_set_name": "A"}} for each in ("cat", text, "sat cat")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    given: dict[str, Any] = {"split": "train", "tokenizer": str(words(tmp_path / "t")), "num_workers": 1}
    with pytest.raises(PileError, match=rf"a\.jsonl:2: .*{reason}.*--on_bad_record skip"):
        tokenize([path], output_dir=tmp_path / "data", **given)
    counts = tokenize([path], output_dir=tmp_path / "data", on_bad_record="skip", **given)
    assert (counts.documents, counts.bad_records) == (2, 1)
    assert list_shards(tmp_path / "data", "train")[0].tokens.tolist() == [0, 5, 1, 0, 5]


def test_an_id_between_those_of_the_vocabulary_is_unknown(tmp_path: Path) -> None:
    """The library would leave it out."""
    tokenizer = FileTokenizer.load(words(tmp_path / "t"))
    with pytest.raises(TokenizerError, match="has no id 3"):
        tokenizer.decode([0, 3])


# The file beside the shards


def test_splits_with_other_ends_do_not_share_a_folder(corpus: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"output_dir": tmp_path / "data", "num_workers": 1}
    given["tokenizer"] = str(byte_level(tmp_path / "t", None))
    tokenize([corpus], split="val", **given)
    with pytest.raises(PileError, match=r"split 'val' in .* has end_of_text 256 and not 257"):
        tokenize([corpus], split="train", end_of_text="<s>", **given)


def test_a_newer_library_that_writes_other_json_opens_the_file(
    trained: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shards_of(corpus, tmp_path / "data", trained)
    ids = list_shards(data, "train")[0].ids
    monkeypatch.setattr("data_processing.tokenizer_files.canonical", lambda _: "other words")
    assert tokenizer_of(ids, data).ids == ids
    (file,) = data.glob("tokenizer-*.json")
    file.write_text(file.read_text() + " ")
    with pytest.raises(TokenizerError, match="is not the tokenizer that made the shards"):
        tokenizer_of(ids, data)


def test_a_cut_shard_of_large_ids_has_the_type_and_the_ids_of_its_source(
    corpus: Path, tmp_path: Path
) -> None:
    data = shards_of(corpus, tmp_path / "data", large(tmp_path / "large"))
    (shard,) = list_shards(data, "train")
    (tmp_path / "new").mkdir()
    ranges = [np.array([[3, 9], [shard.num_tokens - 2, shard.num_tokens]])]
    with ShardWriter(tmp_path / "new", "A", split="train", ids=shard.ids) as writer:
        cut_shard(shard, ranges, writer, progress_bar("cutting", 1, "B"))
    new = open_shard(tmp_path / "new" / "A.json", verify_checksum=True)
    kept = [*shard.tokens[:3].tolist(), *shard.tokens[9:-2].tolist(), shard.ids.end_of_text]
    assert new.ids == shard.ids and new.tokens.dtype == np.dtype("<u4") and new.tokens.tolist() == kept


# The bytes of tokens

SPACE, BYTES, FUSE = (
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": [SPACE, BYTES, FUSE]}, {"type": "Sequence", "decoders": [SPACE, FUSE]},
        metaspace("never"), {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, FUSE]},
    ],
)  # fmt: skip
def test_the_bytes_of_a_token_are_those_that_the_library_decodes(decoder: dict[str, Any]) -> None:
    if decoder.get("decoders", [{}])[0] == {"type": "ByteLevel"}:
        decoder["decoders"][0] |= {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokens = ["▁cat", "a▁▁b", "Ġcat", "café", "<0x41>", "<0xZZ>", "cat_"]
    library = Tokenizer(
        models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="cat_")
    )
    content = json.loads(library.to_str())
    library = Tokenizer.from_str(json.dumps(content | {"decoder": decoder}))
    of_token = token_decoder(decoder)
    assert of_token is not None
    for place, token in enumerate(tokens):
        assert of_token(token).decode("utf-8", "replace") == library.decode([place]), token


@pytest.mark.parametrize(
    "decoder",
    [
        None, metaspace("always"), metaspace("first"), {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [SPACE, BYTES, FUSE, STRIP]}, {"type": "Sequence", "decoders": [BYTES, SPACE]},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": " "},
    ],
)  # fmt: skip
def test_a_token_without_bytes_of_its_own_cannot_be_searched_for(
    decoder: dict[str, Any] | None, trained: Path, tmp_path: Path
) -> None:
    """A decoder that strips the text's first space would find ' cat' where a document begins with 'cat'."""
    folder = shutil.copytree(trained, tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"decoder": decoder}))
    kind = "null" if decoder is None else decoder["type"]
    with pytest.raises(TokenizerError, match=f"its decoder is .*{kind}.*cannot be searched for a text"):
        FileTokenizer.load(folder).token_bytes()


def test_a_token_of_letters_that_are_no_bytes_has_its_own(tmp_path: Path) -> None:
    tokenizer = FileTokenizer.load(byte_level(tmp_path / "t", None, extra=("北京",)))
    table = tokenizer.token_bytes()
    assert table[256] == "北京".encode() and tokenizer.decode([256]) == "北京" and table[257] == b"</s>"


# Training


def test_what_cannot_be_trained_is_one_line(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"--vocabulary 9999: the input gives only [0-9]+ ids"):
        train_tokenizer([corpus], 9999, tmp_path / "t")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + '{"text": "no domain"}\n')
    given = ["--input", str(bad), "--vocabulary", "300", "--output_dir", str(tmp_path / "t")]
    assert train_main(given) == 1
    assert "bad.jsonl:101: the record has no 'meta'" in caplog.text
    assert not (tmp_path / "t").exists()
