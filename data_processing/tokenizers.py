"""Encode and decode text: with GPT-2's vocabulary, or with any tokenizer of Hugging Face's format (tokenizer_files.py).

gpt2        byte-pair encoding by tiktoken; needs its vocabulary file (downloaded once, then cached)
gpt2_bytes  one id a byte: the ids of GPT-2's 256 single-byte tokens; needs no download. About four times as
            many tokens for the same text, which a real GPT-2 decodes to that text.
"""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from data_processing.shards import GPT2_BYTES_IDS, GPT2_IDS, TokenIds, Tokens
from foundation.errors import UserError
from foundation.optional import optional
from foundation.paths import expand_home

if TYPE_CHECKING:
    import tiktoken

TOKENIZERS = {ids.tokenizer: ids for ids in (GPT2_IDS, GPT2_BYTES_IDS)}
CACHES = {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"}  # variables of tiktoken, which does not expand `~`


class TokenizerError(UserError):
    """A tokenizer is unknown, lacks an id, or cannot load its vocabulary."""


class Tokenizer(Protocol):
    """The interface of all tokenizers."""

    ids: TokenIds

    def encode(self, text: str) -> Tokens:
        """Return the ids of a text, (tokens,). Names of special tokens are encoded as ordinary text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Part of a character becomes U+FFFD.

        Raises TokenizerError for an unknown id.
        """

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each id of the vocabulary; empty for an id that this tokenizer never makes.

        Raises TokenizerError if the bytes of a token depend on those around it.
        """


def get_tokenizer(name: str) -> Tokenizer:
    """Return one of TOKENIZERS. Raises TokenizerError if it is unknown or cannot load its vocabulary."""
    if name == "gpt2":
        return Gpt2.load()
    if name == "gpt2_bytes":
        return Gpt2Bytes()
    raise TokenizerError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")


# tiktoken matches `\s+(?!\S)` of GPT-2's pattern by backtracking, at most 10^6 steps, and fails on a longer
# run of white space before a word. So the text is cut before the last character of a long run. The first part
# then ends in white space, which `\s++$` matches at once, and the pieces and ids are the same. The class
# below is Unicode's White_Space, as Rust's \s; Python's \s has four more characters.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONGEST_RUN = 100_000
_LONG_RUN = re.compile(rf"(?<![{_WHITE}])[{_WHITE}]{{{_LONGEST_RUN},}}+(?=[^{_WHITE}])")


class Gpt2:
    """GPT-2's byte-pair encoding (Radford et al. 2019), by tiktoken.

    Its pickle contains the vocabulary: worker processes need no file and start five times as fast.
    """

    ids = GPT2_IDS

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        self._encoding = encoding

    @classmethod
    def load(cls) -> Self:
        """Load the vocabulary.

        Raises:
            TokenizerError: it cannot be loaded.
            UserError: a cache variable names a `~user` who does not exist.
        """
        for variable in CACHES & os.environ.keys():
            os.environ[variable] = expand_home(os.environ[variable], variable)
        library = optional("tiktoken", "train")
        try:
            return cls(library.get_encoding("gpt2"))
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
        # the same ids as encode_ordinary, but without a Python integer per token
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        try:
            return self._encoding.decode(list(map(int, ids)), errors="replace")
        except (KeyError, OverflowError) as error:
            raise TokenizerError(f"tokenizer gpt2 has no id {error}") from error

    def token_bytes(self) -> list[bytes]:
        return [self._encoding.decode_single_token_bytes(token_id) for token_id in range(GPT2_IDS.vocabulary)]


def _gpt2_from(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> Gpt2:
    encoding = optional("tiktoken", "train").Encoding
    return Gpt2(encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens))


def byte_ids() -> npt.NDArray[np.uint16]:
    """Return (256,) the id of GPT-2's single-byte token for each byte.

    Ids 0 to 255 are the bytes in the order of `bytes_to_unicode` in GPT-2's encoder.py: first the printable
    Latin-1 characters, then the rest.
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
    """Encode each byte of the UTF-8 text as one id of GPT-2's vocabulary."""

    ids = GPT2_BYTES_IDS

    def __init__(self) -> None:
        self._ids = byte_ids()
        self._bytes = {int(token_id): bytes([byte]) for byte, token_id in enumerate(self._ids)}
        self._bytes[GPT2_IDS.end_of_text] = b"<|endoftext|>"

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        return self._ids[np.frombuffer(text.encode("utf-8"), np.uint8)]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        try:
            data = b"".join(self._bytes[int(token_id)] for token_id in ids)
        except KeyError as error:
            raise TokenizerError(
                f"tokenizer gpt2_bytes has no id {error}: its ids are 0 to 255 and {GPT2_IDS.end_of_text}"
            ) from error
        return data.decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [self._bytes.get(token_id, b"") for token_id in range(GPT2_IDS.vocabulary)]
