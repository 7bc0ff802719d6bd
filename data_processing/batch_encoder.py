"""What a worker process does: lines of JSON in, token ids by domain out."""

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from data_processing.pile_records import BadRecord, LineBatch, numbered_lines, parse_record
from data_processing.shards import EOT
from data_processing.tokenizers import Tokenizer

_END = np.array([EOT], np.uint16)


@dataclass
class Counts:
    """What became of the records. One whose text is "" is neither a document nor bad: it is only counted."""

    documents: int = 0
    tokens: int = 0  # with one END_OF_TEXT a document
    text_bytes: int = 0  # of UTF-8
    empty_texts: int = 0
    bad_records: int = 0

    def add(self, other: "Counts") -> None:
        for counter in fields(self):
            setattr(self, counter.name, getattr(self, counter.name) + getattr(other, counter.name))


@dataclass
class EncodedBatch:
    """The answer to one LineBatch."""

    counts: Counts
    tokens: dict[
        str, npt.NDArray[np.uint16]
    ]  # domain -> whole documents, each with its END_OF_TEXT, in their order
    bad_records: list[tuple[int, str]] = field(default_factory=list)  # line number, what is wrong


class BatchEncoder:
    """LineBatch -> EncodedBatch, with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        counts = Counts()
        bad_records: list[tuple[int, str]] = []
        documents: dict[str, list[npt.NDArray[np.uint16]]] = {}
        for number, line in numbered_lines(batch):
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
