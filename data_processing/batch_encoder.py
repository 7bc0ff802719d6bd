"""Encode lines of JSON into token ids by domain, in a worker process."""

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from data_processing.pile_records import BadRecord, LineBatch, number_lines, parse_record
from data_processing.shards import EOT
from data_processing.tokenizers import Tokenizer

_END = np.array([EOT], np.uint16)


@dataclass
class Counts:
    """Counts of records, by what became of them."""

    documents: int = 0
    tokens: int = 0  # with one END_OF_TEXT per document
    text_bytes: int = 0  # in UTF-8
    empty_texts: int = 0  # records whose text is "": left out, but not bad
    bad_records: int = 0

    def add(self, other: "Counts") -> None:
        """Add the counts of another part."""
        for counter in fields(self):
            setattr(self, counter.name, getattr(self, counter.name) + getattr(other, counter.name))


@dataclass
class EncodedBatch:
    """The encoded records of one LineBatch."""

    counts: Counts
    tokens: dict[str, npt.NDArray[np.uint16]]  # domain -> whole documents in order, each with its END_OF_TEXT
    bad_records: list[tuple[int, str]] = field(default_factory=list)  # line number, reason


class BatchEncoder:
    """Encode LineBatches with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        counts = Counts()
        bad_records: list[tuple[int, str]] = []
        documents: dict[str, list[npt.NDArray[np.uint16]]] = {}
        for number, line in number_lines(batch):
            try:
                text, domain = parse_record(line)
            except BadRecord as error:
                bad_records.append((number, str(error)))
                continue
            if not text:
                counts.empty_texts += 1
                continue
            ids = self._tokenizer.encode(text)
            documents.setdefault(domain, []).extend((ids, _END))
            counts.text_bytes += len(text.encode("utf-8"))
            counts.tokens += len(ids) + 1
            counts.documents += 1
        counts.bad_records = len(bad_records)
        tokens = {domain: np.concatenate(pieces) for domain, pieces in documents.items()}
        return EncodedBatch(counts, tokens, bad_records)
