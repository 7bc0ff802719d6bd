"""The two tokenizers. Both make ids of GPT-2's vocabulary, uint16, without special tokens.

gpt2        byte-pair encoding by tiktoken; needs its vocabulary file (downloaded once, then cached)
gpt2_bytes  one id a byte: the ids of GPT-2's 256 single-byte tokens; needs no download. About four times as
            many tokens for the same text, which a real GPT-2 decodes to that text.
"""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import tiktoken

from data_processing.shards import EOT
from foundation.errors import UserError
from foundation.paths import expand_home

TOKENIZERS = ("gpt2", "gpt2_bytes")
CACHES = {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"}  # where tiktoken looks, taking `~` for a name


class TokenizerError(UserError):
    """A tokenizer is not known, or its vocabulary cannot be had."""


class Tokenizer(Protocol):
    """What get_tokenizer returns."""

    name: str

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """The ids of a text, (tokens,); text that spells a special token is ordinary text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut shows as U+FFFD. TokenizerError for an unknown id."""

    def token_bytes(self) -> list[bytes]:
        """(EOT,): the bytes of each id below END_OF_TEXT; empty for an id that this tokenizer never makes."""


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name. Raises TokenizerError if there is none, or its vocabulary cannot be had."""
    if name == "gpt2":
        return Gpt2.load()
    if name == "gpt2_bytes":
        return Gpt2Bytes()
    raise TokenizerError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")


# GPT-2's pattern has `\s+(?!\S)`, which tiktoken's regular expressions match by backtracking, with a stack
# of 10^6 steps: a longer run of white space before a word is an error there. The same pieces, and so the
# same ids, come from cutting the text before the run's last character: the first part then ends in white
# space, which `\s++$` takes at once. The class is Unicode's White_Space, which is Rust's \s; Python's has
# four characters more.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONGEST_RUN = 100_000
_LONG_RUN = re.compile(rf"(?<![{_WHITE}])[{_WHITE}]{{{_LONGEST_RUN},}}+(?=[^{_WHITE}])")


class Gpt2:
    """GPT-2's byte-pair encoding (Radford et al. 2019), by tiktoken.

    A pickled one has its vocabulary with it, so that other processes need no file and a fifth of the time.
    """

    name = "gpt2"

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    @classmethod
    def load(cls) -> Self:
        """Loads the vocabulary. Raises TokenizerError if that fails, UserError for a cache's `~user` that is
        not there."""
        for variable in CACHES & os.environ.keys():
            os.environ[variable] = expand_home(os.environ[variable], variable)
        try:
            return cls(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # no network, a read-only cache, a damaged file
            raise TokenizerError(
                f"tokenizer gpt2: tiktoken could not load its vocabulary ({type(error).__name__}: {error}). "
                "Set TIKTOKEN_CACHE_DIR to a folder with the files that tiktoken caches (use it once where "
                "there is a network, copy that folder), or choose --tokenizer gpt2_bytes, which needs none"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        encoding = self._encoding
        return _gpt2_from, (encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        if len(text) < _LONGEST_RUN:
            return self._encode(text)
        cuts = [0, *(match.end() - 1 for match in _LONG_RUN.finditer(text)), len(text)]
        parts = [self._encode(text[start:end]) for start, end in pairwise(cuts)]
        return np.concatenate(parts)

    def _encode(self, text: str) -> npt.NDArray[np.uint16]:
        # the ids of encode_ordinary, but faster and smaller: no Python integers are made
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        try:
            return self._encoding.decode(list(map(int, ids)), errors="replace")
        except (KeyError, OverflowError) as error:
            raise TokenizerError(f"tokenizer gpt2 has no id {error}") from error

    def token_bytes(self) -> list[bytes]:
        return [self._encoding.decode_single_token_bytes(token_id) for token_id in range(EOT)]


def _gpt2_from(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> Gpt2:
    return Gpt2(
        tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    )


def byte_ids() -> npt.NDArray[np.uint16]:
    """(256,): byte -> the id of GPT-2's token of that one byte.

    The first 256 ids are the bytes in the order of `bytes_to_unicode` in GPT-2's encoder.py: those that are
    printable Latin-1 characters, then the rest.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    order = printable + [byte for byte in range(256) if byte not in printable]
    ids = np.empty(256, np.uint16)
    ids[order] = np.arange(256)
    return ids


class Gpt2Bytes:
    """Every byte of the UTF-8 text by its own id in GPT-2's vocabulary."""

    name = "gpt2_bytes"

    def __init__(self) -> None:
        self._ids = byte_ids()
        self._bytes = {int(token_id): bytes([byte]) for byte, token_id in enumerate(self._ids)}
        self._bytes[EOT] = b"<|endoftext|>"

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        return self._ids[np.frombuffer(text.encode("utf-8"), np.uint8)]

    def decode(self, ids: Sequence[int]) -> str:
        try:
            data = b"".join(self._bytes[int(token_id)] for token_id in ids)
        except KeyError as error:
            raise TokenizerError(
                f"tokenizer gpt2_bytes has no id {error}: its ids are 0 to 255 and {EOT}"
            ) from error
        return data.decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [self._bytes.get(token_id, b"") for token_id in range(EOT)]
