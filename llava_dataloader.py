"""LLaVA records as the samples of a run: rows of an image and its conversation, with permanent ids.

A domain is the first folder of the records' image paths. A sample's number in it is the record's position in its
JSON file, whatever was skipped; the order of training is by global position, as of text (dataloader.py).
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_processing.blocks import BLOCK_BITS, Batch
from data_processing.domain_lists import Selection, listed
from data_processing.images import small_png
from data_processing.llava_records import (
    IGNORED,
    IMAGE,
    Ids,
    LlavaRecord,
    RecordError,
    encode_record,
    open_image,
    read_records,
)
from data_processing.shards import TokenIds
from data_processing.tokenizers import Tokenizer
from foundation.errors import ConfigError, file_errors
from foundation.progress import progress_bar
from score_store.samples import Sample
from score_store.validation_rows import Shown

PREPROCESSOR = "preprocessor_config.json"  # in a model's folder
SPEAKERS = {"human": "question", "gpt": "answer"}
SHOWN = 3  # skipped records in the log

logger = logging.getLogger(__name__)


def text_of(record: LlavaRecord) -> str:
    """Return a record's conversation, a line for each turn; the image's place is left out."""
    turns = ((SPEAKERS[role], turn.replace(IMAGE, "").strip()) for role, turn in record.turns)
    return "\n".join(f"{speaker}: {turn}" for speaker, turn in turns)


def image_processor(model_folder: Path | None, size: int) -> CLIPImageProcessorPil:
    """Return what resizes, crops and normalises images: what the model's folder says, else CLIP's own for this size.

    Raises ConfigError if the folder asks for another kind, or for another size than the model's.
    """
    path = None if model_folder is None else model_folder / PREPROCESSOR
    if path is None or not path.is_file():
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    with file_errors(path, ConfigError):
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kind = settings["image_processor_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} does not say its image_processor_type ({error})") from error
    if not kind.startswith("CLIPImageProcessor"):
        raise ConfigError(f"{path}: images for {kind} are not made here, only for CLIPImageProcessor")
    found = CLIPImageProcessorPil.from_dict(settings)
    cropped = found.crop_size["height"], found.crop_size["width"]
    if cropped != (size, size):
        raise ConfigError(f"{path}: makes images of {cropped}, and the model takes {size} x {size}")
    return found


class LlavaDataset:
    """The records of one split, or of some of its domains. Images are decoded when a batch needs them.

    Its attributes are those of a BlockDataset: a domain's blocks are its records.
    """

    all_domains: list[str]  # of the split, sorted
    block_size: int  # T
    ids: TokenIds
    short: dict[str, int]  # none: every record is a whole row
    domains: tuple[str, ...]  # in use, sorted
    checksums: dict[str, str]  # domain -> sha256 of its records and the sizes of their images
    max_token_id: int
    blocks_per_domain: dict[str, int]  # records, of the domains in use
    num_blocks: int

    def __init__(
        self,
        json_path: Path,
        image_folder: Path,
        selection: Selection,
        *,
        model: LlavaConfig,
        model_folder: Path | None,
        tokenizer: Tokenizer,
        block_size: int,
        on_bad_record: Literal["error", "skip"],
    ) -> None:
        """Read and check the records, and encode each of them once.

        Args:
            model: whose image size, tokens of an image and their id the rows get.
            model_folder: where the model comes from; None for a new one.

        Raises:
            RecordError: a record is bad or too long and on_bad_record is "error"; none is left.
            ConfigError: a named domain does not exist.
        """
        self.path, self.image_folder, self.block_size = json_path, image_folder, block_size
        self.ids, self._tokenizer, self.short = tokenizer.ids, tokenizer, {}
        self._image_tokens, self._image_token = model.image_seq_length, model.image_token_index
        self._processor = image_processor(model_folder, model.vision_config.image_size)
        with file_errors(json_path, RecordError):
            records, bad = read_records(json_path, image_folder, on_bad_record)
        self.all_domains = sorted({record.group for record in records})
        self._numbers = {domain: number for number, domain in enumerate(self.all_domains)}
        wanted = self.all_domains if selection.domains is None else list(selection.domains)
        if missing := [name for name in wanted if name not in self._numbers]:
            raise ConfigError(
                f"{selection.given}: no {listed(missing)} in {json_path}; choose from {listed(self.all_domains)}"
            )
        records = [record for record in records if record.group in wanted]
        if on_bad_record == "skip":
            records = self._without_bad(records, bad)
        self._records: dict[str, list[LlavaRecord]] = defaultdict(list)
        self.max_token_id = self._image_token
        for record in records:
            self._records[record.group].append(record)
            self.max_token_id = max(self.max_token_id, int(self.encode(record)[0].max()))
        if not records:
            raise RecordError(f"{json_path}: no record is left; {len(bad)} were bad, the first: {bad[:1]}")
        self.domains = tuple(sorted(self._records))
        self.blocks_per_domain = {domain: len(self._records[domain]) for domain in self.domains}
        self.num_blocks = len(records)
        self.checksums = {domain: self._checksum(self._records[domain]) for domain in self.domains}
        self._by_number = {record.number: record for record in records}
        if bad:
            shown = "; ".join(f"record {number}: {reason}" for number, reason in sorted(bad)[:SHOWN])
            more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            logger.warning("%s: %d records are skipped: %s%s", json_path, len(bad), shown, more)

    def _without_bad(self, records: list[LlavaRecord], bad: list[tuple[int, str]]) -> list[LlavaRecord]:
        """Return the records that can be encoded and whose image can be decoded; add the others to `bad`."""

        def reason(record: LlavaRecord) -> str | None:
            try:
                self.encode(record)
                open_image(record, self.image_folder)
            except RecordError as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool, progress_bar("checking images", len(records), "records") as bar:
            good = []
            for record, wrong in zip(records, pool.map(reason, records), strict=True):
                good += [record] if wrong is None else []
                bad += [] if wrong is None else [(record.number, wrong)]
                bar.update(1)
        return good

    def _checksum(self, records: Sequence[LlavaRecord]) -> str:
        content = hashlib.sha256()
        for record in records:
            size = (self.image_folder / record.image).stat().st_size
            content.update(repr((record.number, str(record.image), size, record.turns)).encode())
        return content.hexdigest()

    def encode(self, record: LlavaRecord) -> tuple[Ids, Ids]:
        """Return a record's row of tokens and its targets (T,) each. Raises RecordError as `encode_record`."""
        try:
            return encode_record(
                record,
                self._tokenizer,
                block_size=self.block_size,
                image_tokens=self._image_tokens,
                image_token_id=self._image_token,
                end_of_text=self._tokenizer.ids.end_of_text,
                begin_of_text=self._tokenizer.ids.begin_of_text,
            )
        except RecordError as error:
            raise RecordError(f"{self.path}: {error}") from error

    def image(self, record: LlavaRecord) -> Tensor:
        """Return a record's image (3, size, size), resized, cropped and normalised. Raises as `open_image`."""
        pixels = self._processor(open_image(record, self.image_folder), return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.ascontiguousarray(pixels[0], dtype=np.float32))

    def sample_id(self, domain: str, number: int) -> int:
        """Return the id of a domain's record: the domain's index in `all_domains` in its high bits."""
        return self._numbers[domain] << BLOCK_BITS | number

    def records(self) -> list[LlavaRecord]:
        """Return all records in use, by domain."""
        return [record for domain in self.domains for record in self._records[domain]]

    def shown(self, number: int) -> Shown:
        """Return what is shown of a record."""
        record = self._by_number[number]
        return Shown(text_of(record), small_png(open_image(record, self.image_folder)))

    def samples(self) -> Iterator[Sample]:
        """Yield what the tools show of each record."""
        for record in self.records():
            x, y = self.encode(record)
            end = int(np.flatnonzero(y != IGNORED)[-1])
            yield Sample(
                self.sample_id(record.group, record.number),
                text_of(record),
                [*x[: end + 1].tolist(), int(y[end])],
                record.group,
                {"image": record.image.as_posix(), "record": record.number, "id": record.name},
            )

    def batch(self, places: Sequence[tuple[str, int]]) -> Batch:
        """Return the batch of the k-th records of domains. Raises RecordError for an image that cannot be decoded."""
        records = [self._records[domain][k] for domain, k in places]
        rows = [self.encode(record) for record in records]
        return Batch(
            x=torch.from_numpy(np.stack([x for x, _ in rows])),
            y=torch.from_numpy(np.stack([y for _, y in rows])),
            sample_ids=np.array(
                [self.sample_id(record.group, record.number) for record in records], np.int64
            ),
            domains=tuple(record.group for record in records),
            blocks=np.array([record.number for record in records], np.int64),
            images=torch.stack([self.image(record) for record in records]),
        )
