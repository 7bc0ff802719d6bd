"""Write and read shards: the tokens of one domain of one split, memory-mapped.

    {data_dir}/{split}/{domain}.bin    token ids, little-endian, uint16 or, for more than 65,536 ids, uint32;
                                       END_OF_TEXT after every whole document
    {data_dir}/{split}/{domain}.idx    int64 little-endian, the position in .bin at which each document starts
    {data_dir}/{split}/{domain}.json   magic, format version, names, counts, what the ids are, checksums

The JSON is renamed into place last, so a shard with a JSON is whole.

The file name is the percent-encoded domain, so that no domain name can lead out of the folder; a long one is
cut and gets a hash. The JSON has the true name. All files of a shard end in .bin, .idx or .json, with
.partial after it while they are written. Other files in a split's folder must end otherwise. Names that begin
with a dot are skipped, because some systems leave such files beside copied ones.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import NoneType
from typing import Any, Self, TypeAlias
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from data_processing.shard_files import AppendedFile, MappedFile, ShardError
from foundation.errors import file_errors
from foundation.files import write_text

MAGIC = "pile-token-shard"
FORMAT_VERSION = 2
MAX_DOMAIN = 1000  # characters of a domain's name; a longer one is surely no name
MAX_FILE_NAME = 200  # characters of an encoded domain; file systems allow 255, suffixes included
KEPT = 100  # characters of a longer encoded domain in its file name
TOKEN_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX_TYPE = np.dtype("<i8")

Tokens: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenIds:
    """What the ids of a shard mean.

    begin_of_text: the first id of every document; None: there is none.
    """

    tokenizer: str  # gpt2, gpt2_bytes, or sha256: and the hash of a tokenizer's file
    vocabulary: int  # ids are below it
    end_of_text: int  # the last id of every document, which no text has
    begin_of_text: int | None

    @property
    def token_type(self) -> np.dtype[Any]:
        """The smallest type of a shard's numbers that holds the ids."""
        return TOKEN_TYPES["uint16" if self.vocabulary <= 1 << 16 else "uint32"]

    @property
    def type_name(self) -> str:
        return self.token_type.name


GPT2_IDS = TokenIds("gpt2", 50257, 50256, None)  # <|endoftext|> is the last id
GPT2_BYTES_IDS = replace(GPT2_IDS, tokenizer="gpt2_bytes")

# Every field of the JSON and its type. open_shard checks them.
FIELDS: dict[str, tuple[type, ...]] = {
    "magic": (str,),
    "format_version": (int,),
    "split": (str,),
    "domain": (str,),
    "tokenizer": (str,),
    "num_tokens": (int,),
    "num_documents": (int,),
    "max_token_id": (int,),
    "vocabulary": (int,),
    "end_of_text": (int,),
    "begin_of_text": (int, NoneType),
    "token_type": (str,),
    "checksum": (str,),  # sha256 of .bin
    "index_checksum": (str,),  # sha256 of .idx
}
# What version 1, which knew GPT-2's ids alone, did not write.
OF_VERSION_1 = {"vocabulary": 50257, "end_of_text": 50256, "begin_of_text": None, "token_type": "uint16"}


@dataclass(frozen=True, eq=False)
class Shard:
    """One open shard. Opening is fast whatever its size: its arrays are mapped on demand.

    Do not keep the arrays: see `MappedFile.array`.
    """

    path: Path  # the JSON
    split: str
    domain: str
    ids: TokenIds
    num_tokens: int
    num_documents: int
    max_token_id: int
    checksum: str  # sha256 of .bin, hexadecimal
    token_file: MappedFile
    start_file: MappedFile

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer that made the tokens."""
        return self.ids.tokenizer

    @property
    def data_dir(self) -> Path:
        """The folder of the splits."""
        return self.path.parent.parent

    @property
    def tokens(self) -> Tokens:
        """(num_tokens,) token ids."""
        return self.token_file.array()

    @property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """(num_documents,) positions in `tokens`."""
        return self.start_file.array()


def domain_file_name(domain: str) -> str:
    """Return the file stem of a domain: its name, percent-encoded except letters, digits and ` ()+,_.~-`.

    A dot at the beginning is encoded, too. If the result is longer than MAX_FILE_NAME, return its first KEPT
    characters, "%~", which no encoding has, and a hash of the domain.

    Raises:
        ShardError: the name is empty or longer than MAX_DOMAIN.
    """
    if not 0 < len(domain) <= MAX_DOMAIN:
        raise ShardError(
            f"domain {domain[:80]!r} cannot name a shard: it has {len(domain)} characters, "
            f"1 to {MAX_DOMAIN} are allowed"
        )
    name = quote(domain, safe=" ()+,")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > MAX_FILE_NAME:
        name = f"{name[:KEPT]}%~{hashlib.sha256(domain.encode()).hexdigest()[:32]}"
    return name


class ShardWriter:
    """Write one shard: `with ShardWriter(...) as shard: shard.append(token_ids)`.

    Files have the suffix `.partial` until the block ends; after an exception they are removed. They are open
    only during a write, so there can be hundreds of writers. Memory does not grow with the shard.

    Raises:
        ShardError: the shard exists or is being written, or nothing was appended.
    """

    def __init__(self, folder: Path, domain: str, *, split: str, ids: TokenIds) -> None:
        self._stem = folder / domain_file_name(domain)
        self._names = {"split": split, "domain": domain}
        self._ids = ids
        self.num_tokens = 0
        self.num_documents = 0
        self._max_token_id = 0
        self._last_token = ids.end_of_text
        self._checksums = {"checksum": hashlib.sha256(), "index_checksum": hashlib.sha256()}
        self._files: dict[str, AppendedFile] = {}

    def __enter__(self) -> Self:
        if self._path("json").exists():
            raise ShardError(f"{self._path('json')}: this shard exists already; remove it first")
        try:
            for suffix in ("bin", "idx"):
                self._files[suffix] = self._new_file(suffix)
        except BaseException:
            self._remove_partial_files()
            raise
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self._commit()
        finally:
            self._remove_partial_files()

    def _new_file(self, suffix: str) -> AppendedFile:
        """Create a file that no other writer has: file systems may treat the names of two domains as one."""
        path = self._partial(suffix)
        try:
            return AppendedFile(path)
        except FileExistsError as error:
            raise ShardError(
                f"{path}: is there already, left by a killed process, or of a domain whose name this file "
                f"system does not distinguish from {self._names['domain']!r}; remove it, or rename the domain"
            ) from error

    def _remove_partial_files(self) -> None:
        """Remove the files that this writer created and did not commit."""
        for suffix in self._files:
            self._partial(suffix).unlink(missing_ok=True)

    def append(self, token_ids: npt.ArrayLike) -> None:
        """Append one document. END_OF_TEXT is added here.

        Args:
            token_ids: (k,) integers, without END_OF_TEXT.

        Raises:
            ShardError: the document is empty, or an id is not of the vocabulary, or END_OF_TEXT.
        """
        ids, end = self._ids, self._ids.end_of_text
        tokens = np.asarray(token_ids)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ShardError(f"a document is a non-empty list of token ids, got one of shape {tokens.shape}")
        if (
            tokens.dtype.kind not in "iu"
            or tokens.min() < 0
            or tokens.max() >= ids.vocabulary
            or end in tokens
        ):
            raise ShardError(
                f"token ids are integers in [0, {ids.vocabulary}) but {end}, got {tokens.min()} to {tokens.max()} "
                f"({tokens.dtype})"
            )
        self.extend(np.append(tokens, end).astype(ids.token_type))

    def extend(self, tokens: Tokens) -> None:
        """Append whole documents, each with its END_OF_TEXT. Faster than `append`.

        The END_OF_TEXTs give the document starts, because tokenizers never make that id from text.
        """
        ends = np.flatnonzero(tokens == self._ids.end_of_text) + 1
        starts = np.concatenate(([0], ends[:-1]))
        assert len(ends) > 0, "a document without END_OF_TEXT"
        assert ends[-1] == len(tokens), "the last document is without END_OF_TEXT"
        assert np.all(ends - starts > 1), "an empty document"
        self.extend_cut(tokens, starts)

    def extend_cut(self, tokens: Tokens, starts: npt.NDArray[np.int64]) -> None:
        """Append the tokens that are left after parts were cut out.

        A document may lack its END_OF_TEXT (except the shard's last one), may be END_OF_TEXT alone, and may
        continue in the next call.

        Args:
            starts: (k,) ascending, where documents begin in `tokens`.

        Raises:
            ShardError: an id is beyond the vocabulary.
        """
        assert tokens.dtype == self._ids.token_type, tokens.dtype
        assert len(tokens) > 0, "no tokens"
        assert np.all(np.diff(starts, prepend=-1, append=len(tokens)) > 0), "starts out of order, or outside"
        assert self.num_tokens > 0 or starts[:1].tolist() == [0], "the shard's first document starts at 0"
        largest = int(tokens.max())
        if largest >= self._ids.vocabulary:
            raise ShardError(f"token id {largest} is beyond the vocabulary of {self._ids.vocabulary} ids")
        self._write("bin", "checksum", tokens.tobytes())
        self._write("idx", "index_checksum", (starts + self.num_tokens).astype(INDEX_TYPE).tobytes())
        self._max_token_id = max(self._max_token_id, largest)
        self._last_token = int(tokens[-1])
        self.num_tokens += len(tokens)
        self.num_documents += len(starts)

    def _write(self, suffix: str, checksum: str, data: bytes) -> None:
        self._files[suffix].write(data)
        self._checksums[checksum].update(data)

    def _commit(self) -> None:
        if self.num_documents == 0:
            raise ShardError(f"{self._path('json')}: no document was written; a shard has at least one")
        assert self._last_token == self._ids.end_of_text, "the shard's last document is without END_OF_TEXT"
        for suffix, file in self._files.items():
            file.flush()
            self._partial(suffix).rename(self._path(suffix))
        counts = {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "max_token_id": self._max_token_id,
        }
        ids = {**asdict(self._ids), "token_type": self._ids.type_name}
        checksums = {name: checksum.hexdigest() for name, checksum in self._checksums.items()}
        identity = {"magic": MAGIC, "format_version": FORMAT_VERSION}
        write_json_atomically(self._path("json"), identity | self._names | ids | counts | checksums)

    def _path(self, suffix: str) -> Path:
        return Path(f"{self._stem}.{suffix}")

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self._stem}.{suffix}.partial")


def write_json_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, so that `path` never holds part of it."""
    write_text(path, json.dumps(content, indent=1) + "\n", Path(f"{path}.partial"), durable=False)


def open_shard(json_path: Path, *, verify_checksum: bool = False) -> Shard:
    """Open a shard, and check magic, version, sizes, largest id and the ends of the index. Needs few reads.

    Args:
        verify_checksum: also read all of it and compare the checksums.

    Raises:
        ShardError: a check failed.
    """
    fields = _read_fields(json_path)
    if json_path.stem != domain_file_name(fields["domain"]):
        raise ShardError(
            f"{json_path}: holds domain {fields['domain']!r}, its file name says another; rename it back"
        )
    ids = TokenIds(**{field.name: fields.pop(field.name) for field in dataclass_fields(TokenIds)})
    token_type = fields.pop("token_type")
    if fields["max_token_id"] >= ids.vocabulary:
        raise ShardError(
            f"{json_path}: its largest token id {fields['max_token_id']} is beyond the vocabulary of "
            f"{ids.vocabulary} ids: tokenize again"
        )
    if token_type != ids.type_name or not all(
        0 <= each < ids.vocabulary for each in (ids.end_of_text, ids.begin_of_text or 0)
    ):
        raise ShardError(
            f"{json_path}: its vocabulary of {ids.vocabulary} ids, its numbers' type {token_type}, end_of_text "
            f"{ids.end_of_text} and begin_of_text {ids.begin_of_text} do not belong together: tokenize again"
        )
    token_file = _mapped_file(json_path, "bin", ids.token_type, fields["num_tokens"], fields["checksum"])
    start_file = _mapped_file(json_path, "idx", INDEX_TYPE, fields["num_documents"], fields["index_checksum"])
    document_starts, tokens = start_file.array(), token_file.array()
    if (
        document_starts[0] != 0
        or document_starts[-1] >= fields["num_tokens"]
        or tokens[-1] != ids.end_of_text
    ):
        raise ShardError(f"{json_path}: .bin, .idx and .json do not belong together; tokenize again")
    if verify_checksum:
        token_file.verify()
        start_file.verify()
    unneeded = ("magic", "format_version", "index_checksum")
    kept = {name: value for name, value in fields.items() if name not in unneeded}
    return Shard(path=json_path, token_file=token_file, start_file=start_file, ids=ids, **kept)


def _read_fields(json_path: Path) -> dict[str, Any]:
    """Return the JSON's fields. Raises ShardError if one is missing or of another type."""
    try:
        fields = json.loads(json_path.read_bytes())
    except FileNotFoundError as error:
        raise ShardError(f"{json_path}: no such shard") from error
    except ValueError as error:
        raise ShardError(f"{json_path}: is not the JSON of a shard ({error}); tokenize again") from error
    if not isinstance(fields, dict) or fields.get("magic") != MAGIC:
        raise ShardError(
            f'{json_path}: is not the JSON of a shard (no "magic": "{MAGIC}"); remove it from the folder'
        )
    version = fields.get("format_version")
    if version == 1:
        fields |= OF_VERSION_1
    elif version != FORMAT_VERSION:
        raise ShardError(
            f"{json_path}: has format version {fields.get('format_version')!r}, this code reads "
            f"1 and {FORMAT_VERSION}; tokenize again"
        )
    for name, kinds in FIELDS.items():
        if name not in fields or type(fields[name]) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ShardError(f"{json_path}: {name} is {fields.get(name)!r}, not {wanted}; tokenize again")
    return {name: fields[name] for name in FIELDS}


def _mapped_file(
    json_path: Path, suffix: str, item_type: np.dtype[Any], count: int, checksum: str
) -> MappedFile:
    """Return a file of `count` items. Raises ShardError if it is missing or has another size."""
    path = json_path.with_suffix(f".{suffix}")
    if not path.is_file():
        raise ShardError(f"{json_path}: its {path.name} is missing; copy it there, or tokenize again")
    file, expected = MappedFile(path, item_type, checksum), count * item_type.itemsize
    if file.size != expected or count <= 0:
        raise ShardError(
            f"{path}: has {file.size} bytes, its JSON says {expected}; truncated or foreign: tokenize again"
        )
    return file


def visible(paths: Iterable[Path]) -> list[Path]:
    """Return the paths whose name does not begin with a dot."""
    return [path for path in paths if not path.name.startswith(".")]


def list_shards(data_dir: Path, split: str) -> list[Shard]:
    """Open every shard of a split, sorted by domain.

    Raises:
        ShardError: there are none; one is damaged or cannot be read; their tokenizers differ.
    """
    folder = data_dir / split
    with file_errors(folder, ShardError):
        json_paths = _json_paths(folder)
        if not json_paths:
            raise ShardError(_no_shards(data_dir, split))
        shards = sorted((open_shard(path) for path in json_paths), key=lambda shard: shard.domain)
    for shard in shards:
        if shard.split != split:
            raise ShardError(f"{shard.path}: was made for split {shard.split!r}, but lies in {split!r}")
        if shard.ids != shards[0].ids:
            raise ShardError(
                f"{folder}: {shards[0].path.name} has tokenizer {shards[0].tokenizer!r}, {shard.path.name} "
                f"{shard.tokenizer!r}, or other ids for the ends of texts; tokenize one of them again, into its own "
                "folder"
            )
    return shards


def _json_paths(folder: Path) -> list[Path]:
    """Return the JSON path of each shard in a folder; none if the folder does not exist.

    Raises:
        ShardError: a shard has no JSON.
        OSError: the folder cannot be read. (A glob would hide that.)
    """
    try:
        paths = sorted(visible(folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    json_paths = [path for path in paths if path.suffix == ".json"]
    for path in paths:
        if path.suffix == ".bin" and path.with_suffix(".json") not in json_paths:
            raise ShardError(f"{path}: has no {path.stem}.json beside it; copy it there, or tokenize again")
    return json_paths


def _no_shards(data_dir: Path, split: str) -> str:
    others = sorted({path.parent.name for path in visible(data_dir.glob("[!.]*/*.json"))} - {split})
    found = f" (splits there: {', '.join(others)})" if others else ""
    return (
        f"no shards of split {split!r} in {data_dir}{found}. Make them with\n"
        f"  python -m data_processing.tokenize_pile --input FILES --split {split} --output_dir {data_dir} "
        "--tokenizer gpt2\nor, for the demo corpus,\n"
        f"  python -m data_processing.demo_corpus --output_dir {data_dir}"
    )
