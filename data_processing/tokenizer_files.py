"""Any tokenizer in Hugging Face's format: a tokenizer.json, or the folder of a model that has one.

The `tokenizers` library encodes and decodes. The file travels with the shards that it made, under its own hash:
{data_dir}/tokenizer-<16 hexadecimal digits>.json; a shard names the whole hash.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from data_processing.shards import TokenIds, Tokens
from data_processing.tokenizers import TOKENIZERS, Tokenizer, TokenizerError, byte_ids, get_tokenizer
from foundation.errors import file_errors
from foundation.files import write_text

FILE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # where a folder names its special tokens
PREFIX = "sha256:"
SHOWN_DIGITS = 16
# id of a byte in byte_ids()'s order <-> the character that stands for the byte in a byte-level vocabulary
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


class FileTokenizer:
    """A tokenizer from a file. Names of special tokens are ordinary text to it.

    Raises:
        TokenizerError: it makes an id from text that stands for the end or the beginning of one.
    """

    def __init__(self, library: tokenizers.Tokenizer, end_of_text: int, begin_of_text: int | None) -> None:
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        self._library, self._text = library, canonical(library)
        size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        name = PREFIX + hashlib.sha256(self._text.encode()).hexdigest()
        self.ids = TokenIds(name, size, end_of_text, begin_of_text)
        self._reserved = [end_of_text] + ([] if begin_of_text is None else [begin_of_text])

    @classmethod
    def load(cls, path: Path, *, end_of_text: str | None = None, begin_of_text: str | None = None) -> Self:
        """Read a tokenizer.json, or that of a folder.

        Args:
            end_of_text: the token after each document; None: the eos_token that the folder names.
            begin_of_text: the token before each document; None: the one that the tokenizer itself puts before a
                text, if any.

        Raises:
            TokenizerError: it cannot be read; nothing says what ends a text; a token is not of its vocabulary.
        """
        file = path / FILE if path.is_dir() else path
        library = read_library(file)
        named = end_of_text if end_of_text is not None else named_end(file.parent)
        if named is None:
            raise TokenizerError(
                f"--tokenizer {path}: nothing says which token ends a text (no eos_token in {' or '.join(SETTINGS)} "
                "beside it); give --end_of_text TOKEN"
            )
        begin = None if begin_of_text is None else cls._id(library, file, begin_of_text)
        if begin is None:
            whole = library.encode("a", add_special_tokens=True).ids
            plain = library.encode("a", add_special_tokens=False).ids
            begin = whole[0] if len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain else None
        return cls(library, cls._id(library, file, named), begin)

    @staticmethod
    def _id(library: tokenizers.Tokenizer, file: Path, token: str) -> int:
        found = library.token_to_id(token)
        if found is None:
            raise TokenizerError(f"{file}: has no token {token!r}; name one of its vocabulary")
        return int(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_text, (self._text, self.ids.end_of_text, self.ids.begin_of_text)

    def encode(self, text: str) -> Tokens:
        return self._checked(self._library.encode(text, add_special_tokens=False).ids, text)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._checked(each.ids, text) for each, text in zip(found, texts, strict=True)]

    def _checked(self, ids: list[int], text: str) -> Tokens:
        tokens = np.array(ids, self.ids.token_type)
        for reserved in self._reserved:
            if reserved in tokens:
                raise TokenizerError(
                    f"tokenizer {self.ids.tokenizer[:23]} makes id {reserved}, which stands for the end or the "
                    f"beginning of a text, from the text {text[:60]!r}: name another with --end_of_text or "
                    "--begin_of_text"
                )
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        if unknown := [each for each in ids if not 0 <= each < self.ids.vocabulary]:
            raise TokenizerError(f"tokenizer {self.ids.tokenizer[:23]} has no id {unknown[0]}")
        text: str = self._library.decode(list(map(int, ids)), skip_special_tokens=False)
        return text

    def token_bytes(self) -> list[bytes]:
        decoder = json.loads(self._text).get("decoder")
        of_token = token_decoder(decoder)
        if of_token is None:
            kind = "none" if decoder is None else decoder["type"]
            raise TokenizerError(
                f"tokenizer {self.ids.tokenizer[:23]}: the text of a token depends on those around it (its decoder is "
                f"{kind}), so its shards cannot be searched for a text; byte-level and byte-fallback tokenizers can"
            )
        added = {id_: token.content for id_, token in self._library.get_added_tokens_decoder().items()}
        table = [b""] * self.ids.vocabulary
        for token, id_ in self._library.get_vocab(with_added_tokens=True).items():
            table[id_] = added[id_].encode() if id_ in added else of_token(token)
        return table

    def save(self, data_dir: Path) -> Path:
        """Write the file that travels with shards, if it is not there yet, and return its path.

        Raises:
            TokenizerError: another file is in its place, or it cannot be written.
        """
        path = travelling_file(data_dir, self.ids.tokenizer)
        with file_errors(path, TokenizerError):
            if not path.exists():
                data_dir.mkdir(parents=True, exist_ok=True)
                write_text(path, self._text, path.with_name(f".{path.name}.tmp"))
            elif path.read_text(encoding="utf-8") != self._text:
                raise TokenizerError(f"{path}: is another tokenizer than its name says; remove it")
        return path


def _from_text(text: str, end_of_text: int, begin_of_text: int | None) -> FileTokenizer:
    return FileTokenizer(tokenizers.Tokenizer.from_str(text), end_of_text, begin_of_text)


def canonical(library: tokenizers.Tokenizer) -> str:
    """Return the tokenizer's JSON without what does not change the ids of a text."""
    content = json.loads(library.to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def read_library(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises TokenizerError, naming the file and what is wrong."""
    with file_errors(file, TokenizerError):
        if not file.is_file():
            raise TokenizerError(f"--tokenizer: there is no {file}; name a {FILE}, or a folder that has one")
        text = file.read_text(encoding="utf-8")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"{file} is no tokenizer of Hugging Face's format: {str(error)[:200]}"
        ) from error


def named_end(folder: Path) -> str | None:
    """Return the eos_token that a folder names; None if it names none."""
    for name in SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        with file_errors(path, TokenizerError):
            try:
                token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise TokenizerError(f"{path} is no JSON object: {error}") from error
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return str(token)
    return None


def token_decoder(decoder: dict[str, Any] | None) -> Any:
    """Return a function from a token of the vocabulary to its bytes; None if there is none for this decoder."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        of_letter = byte_letters()
        return lambda token: bytes(of_letter[letter] for letter in token)
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds & {
        "ByteFallback", "Metaspace"
    }:  # fmt: skip
        return _fallback_bytes
    return None


def _fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's bytes_to_unicode)."""
    letters = {chr(byte): byte for byte in _PRINTABLE}
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def travelling_file(data_dir: Path, name: str) -> Path:
    """Return the path of the tokenizer's file beside its shards."""
    return data_dir / f"tokenizer-{name.removeprefix(PREFIX)[:SHOWN_DIGITS]}.json"


def open_tokenizer(
    given: str, *, end_of_text: str | None = None, begin_of_text: str | None = None
) -> Tokenizer:
    """Return the tokenizer of a flag: one of TOKENIZERS, or a path. Raises TokenizerError as `FileTokenizer.load`."""
    if given in TOKENIZERS:
        if end_of_text is not None or begin_of_text is not None:
            raise TokenizerError(
                f"--tokenizer {given}: --end_of_text and --begin_of_text are for tokenizers in files"
            )
        return get_tokenizer(given)
    path = Path(given)
    if not path.exists():
        raise TokenizerError(
            f"--tokenizer {given}: neither one of {', '.join(TOKENIZERS)} nor a {FILE} or a folder that is there"
        )
    return FileTokenizer.load(path, end_of_text=end_of_text, begin_of_text=begin_of_text)


def tokenizer_of(ids: TokenIds, data_dir: Path) -> Tokenizer:
    """Return the tokenizer that made the shards of a folder.

    Raises:
        TokenizerError: its file is missing from the folder, or is another one's.
    """
    if ids.tokenizer in TOKENIZERS:
        return get_tokenizer(ids.tokenizer)
    path = travelling_file(data_dir, ids.tokenizer)
    if not path.is_file():
        raise TokenizerError(
            f"{path}, the tokenizer of the shards there, is missing: copy it there with them"
        )
    found = FileTokenizer(read_library(path), ids.end_of_text, ids.begin_of_text)
    if found.ids != ids:
        raise TokenizerError(f"{path} is not the tokenizer that made the shards there: copy the folder again")
    return found


def same_tokenizer(folder: Path, ids: TokenIds) -> bool | None:
    """Return whether a model's folder has the tokenizer that made the tokens; None if it has no tokenizer to compare.

    Of GPT-2's two tokenizers the ids of single bytes and of the end of a text are compared.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    library = read_library(file)
    if ids.tokenizer in TOKENIZERS:
        vocabulary, letters = library.get_vocab(with_added_tokens=True), byte_letters()
        want = {letter: int(byte_ids()[byte]) for letter, byte in letters.items()}
        want["<|endoftext|>"] = ids.end_of_text
        return all(vocabulary.get(token) == id_ for token, id_ in want.items())
    library.no_truncation()
    library.no_padding()
    return ids.tokenizer == PREFIX + hashlib.sha256(canonical(library).encode()).hexdigest()
