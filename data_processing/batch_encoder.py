"""Encode lines of JSON into token ids by domain, in a worker process."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from data_processing.pile_records import BadRecord, LineBatch, number_lines, parse_record
from data_processing.shards import Tokens
from data_processing.tokenizers import Tokenizer, TokenizerError


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
    tokens: dict[str, Tokens]  # domain -> whole documents in order, each with its END_OF_TEXT
    bad_records: list[tuple[int, str]] = field(default_factory=list)  # line number, reason


class BatchEncoder:
    """Encode LineBatches with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.ids
        self._end = np.array([ids.end_of_text], ids.token_type)
        begin = [] if ids.begin_of_text is None else [ids.begin_of_text]
        self._begin = np.array(begin, ids.token_type)

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        counts = Counts()
        bad_records: list[tuple[int, str]] = []
        documents: dict[str, list[Tokens]] = {}
        records: list[tuple[int, str, str]] = []  # line, text, domain
        for number, line in number_lines(batch):
            try:
                text, domain = parse_record(line)
            except BadRecord as error:
                bad_records.append((number, str(error)))
                continue
            if not text:
                counts.empty_texts += 1
                continue
            records.append((number, text, domain))
        encoded = self._encode([text for _, text, _ in records])
        for (number, text, domain), ids in zip(records, encoded, strict=True):
            if isinstance(ids, TokenizerError):
                bad_records.append((number, str(ids)))
                continue
            if len(ids) == 0:
                bad_records.append((number, "the tokenizer makes no token of its text"))
                continue
            documents.setdefault(domain, []).extend((self._begin, ids, self._end))
            counts.text_bytes += len(text.encode("utf-8"))
            counts.tokens += len(self._begin) + len(ids) + 1
            counts.documents += 1
        bad_records.sort()
        counts.bad_records = len(bad_records)
        tokens = {domain: np.concatenate(pieces) for domain, pieces in documents.items()}
        return EncodedBatch(counts, tokens, bad_records)

    def _encode(self, texts: list[str]) -> Sequence[Tokens | TokenizerError]:
        """Return the ids of each text, or why it has none. One such text fails a whole batch: then go one by one."""
        try:
            return self._tokenizer.encode_batch(texts)
        except TokenizerError:
            return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> Tokens | TokenizerError:
        try:
            return self._tokenizer.encode(text)
        except TokenizerError as error:
            return error
