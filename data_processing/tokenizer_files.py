"""Any tokenizer in Hugging Face's format: a tokenizer.json, or the folder of a model that has one.

The `tokenizers` library encodes and decodes. The file travels with the shards that it made, under its own hash:
{data_dir}/tokenizer-<16 hexadecimal digits>.json; a shard names the whole hash.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from data_processing.shards import TokenIds, Tokens
from data_processing.tokenizers import TOKENIZERS, Tokenizer, TokenizerError, byte_ids, get_tokenizer
from foundation.errors import file_errors
from foundation.files import write_text
from foundation.optional import optional

if TYPE_CHECKING:
    import tokenizers

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

    def __init__(self, text: str, end_of_text: int, begin_of_text: int | None) -> None:
        """Take the content of a file that travels with shards, which `canonical` made."""
        self._text, self._library = text, _library(text)
        self._library.encode_special_tokens = True
        self._known = frozenset(self._library.get_vocab(with_added_tokens=True).values())
        self.ids = TokenIds(name_of(text), max(self._known) + 1, end_of_text, begin_of_text)
        self._reserved = [end_of_text] + ([] if begin_of_text is None else [begin_of_text])

    @classmethod
    def load(cls, path: Path, *, end_of_text: str | None = None, begin_of_text: str | None = None) -> Self:
        """Read a tokenizer.json, or that of a folder.

        Args:
            end_of_text: the token after each document; None: the eos_token that the folder names.
            begin_of_text: the token before each document; None: the one that the tokenizer itself puts before a
                text, if any. If that is the end-of-text, which stands before all documents but the first
                already, there is none.

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
        end = cls._id(library, file, named)
        if begin_of_text is None:
            own = own_begin(library, file)
            return cls(canonical(library), end, None if own == end else own)
        begin = cls._id(library, file, begin_of_text)
        if begin == end:
            raise TokenizerError(
                f"--begin_of_text {begin_of_text}: is the end-of-text, which stands between documents already; "
                "leave the flag out, or name another token"
            )
        return cls(canonical(library), end, begin)

    @staticmethod
    def _id(library: "tokenizers.Tokenizer", file: Path, token: str) -> int:
        found = library.token_to_id(token)
        if found is None:
            raise TokenizerError(f"{file}: has no token {token!r}; name one of its vocabulary")
        return int(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTokenizer, (self._text, self.ids.end_of_text, self.ids.begin_of_text)

    def encode(self, text: str) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        with library_errors(f"tokenizer {self.ids.tokenizer[:23]} cannot encode a text"):
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
        if unknown := [each for each in ids if each not in self._known]:
            raise TokenizerError(f"tokenizer {self.ids.tokenizer[:23]} has no id {unknown[0]}")
        text: str = self._library.decode(list(map(int, ids)), skip_special_tokens=False)
        return text

    def token_bytes(self) -> list[bytes]:
        decoder = json.loads(self._text).get("decoder")
        of_token = token_decoder(decoder)
        if of_token is None:
            raise TokenizerError(
                f"tokenizer {self.ids.tokenizer[:23]}: the text of a token depends on those around it (its decoder is "
                f"{json.dumps(decoder)}), so its shards cannot be searched for a text; those of byte-level "
                "tokenizers can, and of byte-fallback ones that put no space before a text"
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
                # Processes that write other splits may save it at the same time.
                write_text(path, self._text, path.with_name(f".{path.name}.{os.getpid()}.tmp"))
            elif path.read_text(encoding="utf-8") != self._text:
                raise TokenizerError(f"{path}: is another tokenizer than its name says; remove it")
        return path


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raise an error of the `tokenizers` library, which raises nothing narrower than Exception, as TokenizerError."""
    try:
        yield
    except Exception as error:
        raise TokenizerError(f"{what}: {str(error)[:200]}") from error


def own_begin(library: "tokenizers.Tokenizer", file: Path) -> int | None:
    """Return the id that a tokenizer itself puts before a text; None if it puts none.

    Raises:
        TokenizerError: it puts several, or it is not seen what it puts.
    """
    if library.post_processor is None:
        return None
    with library_errors(
        f"{file}: cannot encode 'a', to see what it puts before a text; give --begin_of_text"
    ):
        plain, whole = (library.encode("a", add_special_tokens=added).ids for added in (False, True))
    if whole == plain:
        return None
    places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
    if not plain or not places or places[0] > 1:
        raise TokenizerError(
            f"{file}: makes {whole} of 'a', {plain} of them without special tokens, so not one token begins a "
            "text; name it with --begin_of_text"
        )
    return int(whole[0]) if places[0] == 1 else None


def name_of(text: str) -> str:
    """Return the name that shards have for a tokenizer with this canonical text."""
    return PREFIX + hashlib.sha256(text.encode()).hexdigest()


def canonical(library: "tokenizers.Tokenizer") -> str:
    """Return the tokenizer's JSON without what does not change the ids of a text."""
    content = json.loads(library.to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _library(text: str) -> "tokenizers.Tokenizer":
    library: tokenizers.Tokenizer = optional("tokenizers", "train").Tokenizer.from_str(text)
    return library


def read_library(file: Path) -> "tokenizers.Tokenizer":
    """Read a tokenizer.json. Raises TokenizerError, naming the file and what is wrong."""
    with file_errors(file, TokenizerError):
        if not file.is_file():
            raise TokenizerError(f"--tokenizer: there is no {file}; name a {FILE}, or a folder that has one")
        text = file.read_text(encoding="utf-8")
    with library_errors(f"{file} is no tokenizer of Hugging Face's format"):
        return _library(text)


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


def token_decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """Return a function from a token of the vocabulary to its bytes; None if a token has no bytes of its own.

    A decoder that strips the text's first space makes the bytes of its first token others than elsewhere.
    """
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    steps = [step for step in steps if step["type"] != "Fuse"]  # which only joins tokens
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _level_bytes
    spaces, fallback = [], False
    for step in steps:
        if step["type"] == "ByteFallback":
            fallback = True
        elif step["type"] == "Metaspace" and step["prepend_scheme"] == "never" and not fallback:
            spaces.append((step["replacement"], " "))
        elif step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1 and not fallback:
            spaces.append((step["pattern"]["String"], step["content"]))
        else:
            return None
    return partial(_piece_bytes, spaces, fallback) if steps else None


def _level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; as the library does, its UTF-8 if a letter stands for no byte."""
    of_letter = byte_letters()
    return bytes(map(of_letter.__getitem__, token)) if of_letter.keys() >= set(token) else token.encode()


def _piece_bytes(spaces: list[tuple[str, str]], fallback: bool, token: str) -> bytes:
    for old, new in spaces:
        token = token.replace(old, new)
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token) if fallback else None
    return token.encode() if byte is None else bytes([int(byte[1], 16)])


@cache
def byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's bytes_to_unicode)."""
    letters = {chr(byte): byte for byte in _PRINTABLE}
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def travelling_file(data_dir: Path, name: str) -> Path:
    """Return the path of the tokenizer's file beside its shards."""
    return data_dir / f"tokenizer-{name.removeprefix(PREFIX)[:SHOWN_DIGITS]}.json"


def find_tokenizer(
    given: str, *, end_of_text: str | None = None, begin_of_text: str | None = None
) -> tuple[TokenIds, Callable[[], Tokenizer]]:
    """Return the ids of the tokenizer that a flag names, one of TOKENIZERS or a path, and what opens it.

    GPT-2's vocabulary is not read for its ids: what is finished needs no vocabulary to be recognised.

    Raises:
        TokenizerError: as `FileTokenizer.load`.
    """
    if given in TOKENIZERS:
        if end_of_text is not None or begin_of_text is not None:
            raise TokenizerError(
                f"--tokenizer {given}: --end_of_text and --begin_of_text are for tokenizers in files"
            )
        return TOKENIZERS[given], partial(get_tokenizer, given)
    path = Path(given)
    if not path.exists():
        raise TokenizerError(
            f"--tokenizer {given}: neither one of {', '.join(TOKENIZERS)} nor a {FILE} or a folder that is there"
        )
    found = FileTokenizer.load(path, end_of_text=end_of_text, begin_of_text=begin_of_text)
    return found.ids, lambda: found


def open_tokenizer(
    given: str, *, end_of_text: str | None = None, begin_of_text: str | None = None
) -> Tokenizer:
    """Return the tokenizer that a flag names. Raises TokenizerError as `find_tokenizer` and `get_tokenizer`."""
    return find_tokenizer(given, end_of_text=end_of_text, begin_of_text=begin_of_text)[1]()


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
    with file_errors(path, TokenizerError):
        data = path.read_bytes()
    # The file's own hash: another version of the library may write the same tokenizer in other words.
    if PREFIX + hashlib.sha256(data).hexdigest() == ids.tokenizer:
        with library_errors(f"{path} cannot be read by this version of tokenizers"):
            found = FileTokenizer(data.decode("utf-8"), ids.end_of_text, ids.begin_of_text)
        if found.ids == ids:
            return found
    raise TokenizerError(f"{path} is not the tokenizer that made the shards there: copy the folder again")


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
    return ids.tokenizer == name_of(canonical(library))
