"""Decoder architectures of transformers: what docs/coverage.md says of them is so."""

import pytest

from benchmarks.coverage import read_table, try_decoder
from benchmarks.decoders import DECODERS, Decoder

M = 3


def test_the_table_has_all_decoders() -> None:
    assert list(read_table()) == [decoder.name for decoder in DECODERS]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_a_decoder_as_published(decoder: Decoder) -> None:
    """One setting of those behind the table: tied or not as published, eager attention, padded targets."""
    tied = decoder.published_tied()
    outcome = try_decoder(decoder, tied, M, "eager")
    said = read_table()[decoder.name][tied]
    assert outcome.text == said or f"m={M}, eager: {outcome.text}" in said.split("; ")
