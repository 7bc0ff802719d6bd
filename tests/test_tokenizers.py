"""The tokenizers give ids of the real GPT-2 vocabulary."""

import json
import os
import pickle
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken

from data_processing import tokenizers
from data_processing.shards import GPT2_IDS
from data_processing.tokenizers import Gpt2, TokenizerError, byte_ids, get_tokenizer

needs_vocabulary = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary"
)
TEXTS = [
    "Hello, world!",
    "naïve café 中文 😀\n\ttabs",
    "<|endoftext|> as text",
    "\x00\x1c\x85\u2028 odd",
    " ",
    "a" * 3000,
]


def test_byte_ids_are_the_first_256_and_those_that_are_known() -> None:
    ids = byte_ids()
    assert sorted(ids.tolist()) == list(range(256))
    assert [ids[ord(character)] for character in '!"A~'] == [0, 1, 32, 93]
    assert (ids[ord("\n")], ids[ord(" ")]) == (198, 220)  # GPT-2's newline and space


@needs_vocabulary
def test_byte_ids_are_those_of_the_real_vocabulary() -> None:
    encoding = tiktoken.get_encoding("gpt2")
    assert byte_ids().tolist() == [encoding.encode_single_token(bytes([byte])) for byte in range(256)]


@needs_vocabulary
@pytest.mark.parametrize("text", TEXTS)
def test_real_gpt2_decodes_bytes_to_the_same_text(text: str) -> None:
    ids = get_tokenizer("gpt2_bytes").encode(text)
    assert ids.dtype == np.uint16
    assert tiktoken.get_encoding("gpt2").decode(ids.tolist()) == text


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_bytes_round_trip(text: str) -> None:
    tokenizer = get_tokenizer("gpt2_bytes")
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert (
        tokenizer.decode([*tokenizer.encode(text).tolist(), GPT2_IDS.end_of_text]) == text + "<|endoftext|>"
    )


@pytest.mark.parametrize("name", ["gpt2_bytes", pytest.param("gpt2", marks=needs_vocabulary)])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(name: str, text: str) -> None:
    tokenizer = get_tokenizer(name)
    table = tokenizer.token_bytes()
    assert len(table) == GPT2_IDS.vocabulary
    assert b"".join(table[token_id] for token_id in tokenizer.encode(text)) == text.encode()
    assert table.count(b"") == {"gpt2": 0, "gpt2_bytes": GPT2_IDS.end_of_text - 256}[name]


def test_a_cut_character_decodes_to_a_replacement() -> None:
    tokenizer = get_tokenizer("gpt2_bytes")
    assert tokenizer.decode(tokenizer.encode("a😀")[:3].tolist()) == "a\ufffd"


@needs_vocabulary
def test_gpt2_is_ordinary_encoding() -> None:
    tokenizer, encoding = get_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == encoding.encode_ordinary(text)
        assert tokenizer.decode([*ids.tolist(), GPT2_IDS.end_of_text]) == text + "<|endoftext|>"
    assert tokenizer.decode(encoding.encode_ordinary("😀")[:1]) == "\ufffd"


@needs_vocabulary
def test_gpt2_on_the_sample() -> None:
    if "PILE_SAMPLE_DIR" not in os.environ:
        pytest.skip("PILE_SAMPLE_DIR is not set: no sample of the Pile")
    tokenizer, encoding = get_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    with (Path(os.environ["PILE_SAMPLE_DIR"]) / "pile" / "val.jsonl").open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            assert tokenizer.encode(text).tolist() == encoding.encode_ordinary(text)


@needs_vocabulary
def test_cuts_in_long_white_space_do_not_change_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encoding = get_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    monkeypatch.setattr(tokenizers, "_LONGEST_RUN", 3)
    short_run = re.compile(tokenizers._LONG_RUN.pattern.replace("100000", "3"))
    monkeypatch.setattr(tokenizers, "_LONG_RUN", short_run)
    generator = random.Random(0)
    alphabet = [" "] * 8 + list("\n\t\r\u00a0\u2003\x1c\x85") + list("ab'1!é😀")
    cuts = 0
    for _ in range(2000):
        text = "".join(generator.choices(alphabet, k=generator.randrange(1, 40)))
        cuts += len(short_run.findall(text))
        assert tokenizer.encode(text).tolist() == encoding.encode_ordinary(text), repr(text)
    assert cuts > 1000


@needs_vocabulary
def test_a_million_spaces_before_a_word() -> None:
    """tiktoken alone fails on this text."""
    ids = get_tokenizer("gpt2").encode(" " * 1_000_100 + "x")
    assert len(ids) == 1_000_100  # 1,000,099 spaces and " x"
    assert ids[0] == 220
    assert ids[-1] == tiktoken.get_encoding("gpt2").encode_ordinary(" x")[0]


@needs_vocabulary
def test_white_space_that_is_almost_too_long_costs_no_more() -> None:
    """Without its look-behind, the search for long runs would try every place in them: minutes."""
    start = time.perf_counter()
    ids = get_tokenizer("gpt2").encode((" " * 99_999 + "x") * 20)
    assert len(ids) == 20 * 99_999
    assert time.perf_counter() - start < 10


@needs_vocabulary
def test_a_pickled_tokenizer_needs_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(get_tokenizer("gpt2"))
    expected = get_tokenizer("gpt2").encode(TEXTS[1]).tolist()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("loaded again"))
    assert pickle.loads(data).encode(TEXTS[1]).tolist() == expected


def test_a_missing_vocabulary_is_an_error_with_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: object) -> bytes:
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(TokenizerError, match=r"no route to host.*TIKTOKEN_CACHE_DIR.*gpt2_bytes"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_the_home_folder_in_the_vocabularys_is_expanded(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """tiktoken would make a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/cache")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: os.environ[variable])
    found: object = Gpt2.load()._encoding
    assert found == str(tmp_path / "cache")


def test_unknown_names_and_ids_are_errors() -> None:
    with pytest.raises(TokenizerError, match="unknown tokenizer 'gpt3': choose one of gpt2, gpt2_bytes"):
        get_tokenizer("gpt3")
    with pytest.raises(TokenizerError, match="no id 256"):
        get_tokenizer("gpt2_bytes").decode([256])
