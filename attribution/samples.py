"""What the tools ask of a run's samples: text, image, documents. Two sources: blocks of shards, and `samples/`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_processing.blocks import BLOCK_BITS, BlockDataset
from data_processing.shards import Shard
from data_processing.tokenizer_files import tokenizer_of
from data_processing.tokenizers import Tokenizer
from score_store.schema import ScoreError


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text. tokens: of the whole text; shown_tokens: of the part that is here."""

    text: str
    tokens: int
    shown_tokens: int


class Samples(Protocol):
    """The training samples of a run. A sample is named by its domain and its number in it ("block" in the scores)."""

    shards: Sequence[Shard]  # whose documents lie in the samples; none where samples have no documents

    def excerpt(self, domain: str, number: int, tokens: int) -> Excerpt:
        """Return the beginning of a sample's text, of this many tokens where its tokens are at hand.

        Raises:
            LookupError: there is no such sample.
        """

    def image(self, domain: str, number: int) -> Path | None:
        """Return the file of a sample's image; None for samples without one."""


class BlockSamples:
    """Blocks of shards."""

    def __init__(self, blocks: BlockDataset, shards: Sequence[Shard]) -> None:
        self.blocks, self.shards = blocks, shards

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.blocks.ids, self.blocks.folder)

    def excerpt(self, domain: str, number: int, tokens: int) -> Excerpt:
        return excerpt_of(self.tokenizer, self.blocks.tokens(domain, number).tolist(), tokens)

    def image(self, domain: str, number: int) -> Path | None:
        return None


class StoredSamples:
    """Samples that the run keeps in `samples/` (score_store/samples.py). Their texts are shown whole.

    Args:
        domains: all of the run, whose places are the high bits of sample ids.
        images: the folder of images.
    """

    shards: Sequence[Shard] = ()

    def __init__(self, table: ds.Dataset, domains: Sequence[str], images: Path) -> None:
        self.table, self.images = table, images
        self._numbers = {domain: number for number, domain in enumerate(domains)}

    def _row(self, domain: str, number: int) -> dict[str, Any]:
        if domain not in self._numbers:
            raise LookupError(f"there is no group {domain!r}; there are {', '.join(self._numbers)}")
        own = pc.field("sample_id") == (self._numbers[domain] << BLOCK_BITS | number)
        rows: list[dict[str, Any]] = self.table.to_table(filter=own).to_pylist()
        if not rows:
            raise LookupError(f"there is no sample {number} in group {domain!r}")
        return rows[0]

    def excerpt(self, domain: str, number: int, tokens: int) -> Excerpt:
        row = self._row(domain, number)
        return Excerpt(row["text"], len(row["tokens"]), len(row["tokens"]))

    def image(self, domain: str, number: int) -> Path | None:
        name = json.loads(self._row(domain, number)["metadata"]).get("image")
        if name is None:
            return None
        path: Path = self.images / name
        if not path.is_file():
            raise ScoreError(
                f"{path} is missing: name the folder that has {self.images.name}/ with --pile_data_dir"
            )
        return path

    def find(self, text: str, count: int) -> tuple[list[tuple[str, int]], int]:
        """Return the first `count` samples, domain and number, whose texts contain this text, and how many do."""
        ids = self.table.filter(pc.match_substring(pc.field("text"), text)).to_table(["sample_id"])[
            "sample_id"
        ]
        domains = list(self._numbers)
        found = [
            (domains[each >> BLOCK_BITS], each & ((1 << BLOCK_BITS) - 1)) for each in ids[:count].to_pylist()
        ]
        return found, len(ids)


def excerpt_of(tokenizer: Tokenizer, tokens: Sequence[int], limit: int) -> Excerpt:
    """Return the text of the first `limit` tokens."""
    shown = [int(token) for token in tokens[:limit]]
    return Excerpt(tokenizer.decode(shown), len(tokens), len(shown))
