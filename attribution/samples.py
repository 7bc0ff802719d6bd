"""What the tools ask of a run's samples: text, image, documents. Every kind of samples is one class here."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attribution.documents import write_documents, write_no_documents
from attribution.errors import AttributionError
from attribution.pieces import Pieces
from data_processing.blocks import BLOCK_BITS, BlockDataset
from data_processing.shards import Shard
from data_processing.tokenizer_files import tokenizer_of
from data_processing.tokenizers import Tokenizer
from score_store.pieces import pieces_of
from score_store.samples import SCHEMA, StoredRows
from score_store.schema import ScoreError, WordSplit


class NoSuchSampleError(AttributionError):
    """There is no sample of that group and number."""


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text. tokens: of the whole text; shown_tokens: of the part that is here."""

    text: str
    tokens: int
    shown_tokens: int


@dataclass(frozen=True)
class Documents:
    """The documents of shards, which lie in the shards' blocks."""

    shards: Sequence[Shard]
    block_size: int

    @cached_property
    def by_domain(self) -> dict[str, Shard]:
        return {shard.domain: shard for shard in self.shards}

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.shards[0].ids, self.shards[0].data_dir)


class Samples(ABC):
    """The training samples of a run. A sample is named by its domain and its number in it ("block" in the scores)."""

    documents: Documents | None = None  # None: the samples have no documents in them
    noun = "block"  # a sample is shown as "DOMAIN, block NUMBER"
    described: str  # after "a batch of samples, "
    used: Collection[str] | None = None  # the domains that the run trained on; None: not listed
    number_pattern = "[0-9]+"

    @abstractmethod
    def excerpt(self, domain: str, number: int, tokens: int) -> Excerpt:
        """Return the beginning of a sample's text, of this many tokens where its tokens are at hand.

        Raises:
            NoSuchSampleError: there is no such sample.
        """

    def image(self, domain: str, number: int) -> Path | None:
        """Return the file of a sample's image; None for samples without one."""
        return None

    @abstractmethod
    def pieces(self, domain: str, number: int, tokens: int) -> Pieces | None:
        """Return the beginning of a sample's tokens with their texts; None: which text a token has is not known."""

    def place(self, domain: str, number: int) -> str:
        """Return where a sample is, in words."""
        return f"{domain}, {self.noun} {number}"

    @property
    @abstractmethod
    def example(self) -> str:
        """Return an example of what --sample takes."""

    @abstractmethod
    def check(self, domain: str, number: int) -> None:
        """Raise NoSuchSampleError if there is no such sample."""

    def write_documents(self, folder: Path, by_word: WordSplit | None) -> None:
        """Write the values of documents into a folder with those of their samples, as attribution.documents does.

        Args:
            by_word: the split of values by word that the folder has.
        """
        write_no_documents(folder / "documents.parquet")

    def find(self, sample: str) -> tuple[str, int]:
        """Return the domain and number of DOMAIN:NUMBER. Raises AttributionError if there is no such sample."""
        domain, _, number = sample.rpartition(":")
        if re.fullmatch(self.number_pattern, number) is None:
            raise AttributionError(
                f"--sample {sample!r}: give DOMAIN:{self.noun.upper()}, as in '{self.example}'"
            )
        try:
            self.check(domain, int(number))
        except NoSuchSampleError as error:
            raise AttributionError(f"--sample {sample!r}: {error}") from error
        return domain, int(number)


class BlockSamples(Samples):
    """Blocks of shards."""

    documents: Documents

    def __init__(self, blocks: BlockDataset, shards: Sequence[Shard]) -> None:
        self.blocks, self.documents = blocks, Documents(shards, blocks.block_size)
        self.described = f"each a text of {blocks.block_size:,} tokens"
        self.used = blocks.domains

    @property
    def example(self) -> str:
        return f"{self.documents.shards[0].domain}:0"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.blocks.ids, self.blocks.folder)

    def excerpt(self, domain: str, number: int, tokens: int) -> Excerpt:
        return excerpt_of(self.tokenizer, self.blocks.tokens(domain, number).tolist(), tokens)

    def pieces(self, domain: str, number: int, tokens: int) -> Pieces | None:
        own = self.blocks.tokens(domain, number).tolist()
        return Pieces(pieces_of(self.tokenizer.decode, own[:tokens]), len(own), self.place(domain, number))

    def place(self, domain: str, number: int) -> str:
        size = self.documents.block_size
        return f"{super().place(domain, number)}: tokens {number * size:,} to {(number + 1) * size:,}"

    def check(self, domain: str, number: int) -> None:
        by_name, size = self.documents.by_domain, self.documents.block_size
        if domain not in by_name:
            folder = self.documents.shards[0].path.parent
            raise NoSuchSampleError(f"there is no domain {domain!r} in {folder}, but {', '.join(by_name)}")
        blocks = (by_name[domain].num_tokens - 1) // size
        if not 0 <= number < blocks:
            raise NoSuchSampleError(f"{domain!r} has {blocks} blocks of {size} tokens, counted from 0")

    def write_documents(self, folder: Path, by_word: WordSplit | None) -> None:
        source = folder / ("samples.parquet" if by_word is None else "words.parquet")
        target = folder / "documents.parquet"
        write_documents(source, self.documents.shards, self.documents.block_size, target, by_word)


class StoredSamples(Samples):
    """Samples of any loop, which the run keeps in `samples/`. Their number is their id. Texts are shown whole.

    Args:
        images: the folder of images; None: the samples have none.
    """

    noun = "sample"
    number_pattern = "-?[0-9]+"
    remedy = "; a loop puts its samples there with run.samples.append"
    described = "each a row of the loop’s own data"

    def __init__(self, rows: StoredRows, images: Path | None) -> None:
        self.rows, self.images = rows, images

    @property
    def example(self) -> str:
        first = next(self.rows.tables(), None)
        return "GROUP:ID" if first is None else f"{first['group'][0].as_py()}:{first['sample_id'][0].as_py()}"

    def sample_id(self, domain: str, number: int) -> int:
        """Return a sample's id. Raises NoSuchSampleError if there is no such domain."""
        return number

    def number_of(self, sample_id: int) -> int:
        """Return the number of a sample within its domain."""
        return sample_id

    def row(self, domain: str, number: int) -> dict[str, Any]:
        """Return a sample's row. Raises NoSuchSampleError if there is none."""
        try:
            found = self.rows.read(self.sample_id(domain, number))
        except LookupError as error:
            raise NoSuchSampleError(
                f"there is no sample {number} in group {domain!r} of {self._folders()}, which has "
                f"{len(self.rows):,}{self.remedy}"
            ) from error
        if found["group"] != domain:
            raise NoSuchSampleError(
                f"there is no sample {number} in group {domain!r} of {self._folders()}: it is of {found['group']!r}; a "
                "sample has one group, the same in its scores"
            )
        return found

    def _folders(self) -> str:
        return ", ".join(map(str, self.rows.folders))

    def check(self, domain: str, number: int) -> None:
        self.row(domain, number)

    def excerpt(self, domain: str, number: int, tokens: int) -> Excerpt:
        row = self.row(domain, number)
        return Excerpt(row["text"], len(row["tokens"]), len(row["tokens"]))

    def pieces(self, domain: str, number: int, tokens: int) -> Pieces | None:
        row = self.row(domain, number)
        texts = json.loads(row["metadata"]).get("pieces")
        if texts is None:
            return None
        if not (isinstance(texts, list) and all(isinstance(each, str) for each in texts)):
            raise ScoreError(
                f"{self.place(domain, number)} has pieces in its metadata that are no list of strings, {texts!s:.60}: "
                "give one for each token, which joined are the text (score_store.pieces_of)"
            )
        if len(texts) != len(row["tokens"]) or "".join(texts) != row["text"]:
            raise ScoreError(
                f"{self.place(domain, number)} has {len(texts)} pieces of its text in its metadata, for "
                f"{len(row['tokens'])} tokens: give one for each token, which joined are the text "
                "(score_store.pieces_of)"
            )
        return Pieces(texts, len(texts), self.place(domain, number))

    def image(self, domain: str, number: int) -> Path | None:
        name = json.loads(self.row(domain, number)["metadata"]).get("image")
        if name is None or self.images is None:
            return None
        path: Path = self.images / name
        if not path.is_file():
            raise ScoreError(
                f"{path} is missing: name the folder that has {self.images.name}/ with --pile_data_dir"
            )
        return path

    def containing(self, text: str, count: int) -> tuple[list[tuple[str, int]], int]:
        """Return the first `count` samples, domain and number, whose texts contain this text, and how many do."""
        found: list[tuple[str, int]] = []
        total = 0
        for table in self.tables():
            hits = table.filter(pc.match_substring(table["text"], text))
            total += len(hits)
            for row in hits.slice(0, count - len(found)).select(["group", "sample_id"]).to_pylist():
                found.append((row["group"], self.number_of(row["sample_id"])))
        return found, total

    def tables(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """Yield all samples, each once, in tables with columns of score_store.samples.SCHEMA."""
        return self.rows.tables(columns)


class RecordSamples(StoredSamples):
    """LLaVA records, which the run keeps in `samples/`; the high bits of an id are the domain's number.

    Args:
        domains: all of the run.
        used: those that it trained on.
        images: the folder of images.
    """

    noun = "block"
    number_pattern = "[0-9]+"
    remedy = ""
    described = "each an image with a conversation about it"

    def __init__(self, rows: StoredRows, domains: Sequence[str], used: Collection[str], images: Path) -> None:
        super().__init__(rows, images)
        self.used = used
        self._numbers: Mapping[str, int] = {domain: number for number, domain in enumerate(domains)}

    @property
    def example(self) -> str:
        return f"{next(iter(self._numbers))}:0"

    def sample_id(self, domain: str, number: int) -> int:
        if domain not in self._numbers:
            raise NoSuchSampleError(f"there is no group {domain!r}; there are {', '.join(self._numbers)}")
        return self._numbers[domain] << BLOCK_BITS | number

    def number_of(self, sample_id: int) -> int:
        return sample_id & ((1 << BLOCK_BITS) - 1)


def excerpt_of(tokenizer: Tokenizer, tokens: Sequence[int], limit: int) -> Excerpt:
    """Return the text of the first `limit` tokens."""
    shown = [int(token) for token in tokens[:limit]]
    return Excerpt(tokenizer.decode(shown), len(tokens), len(shown))
