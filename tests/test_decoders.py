"""Decoder architectures of transformers: what docs/coverage.md says of them is so."""

import pytest

from benchmarks.coverage import Outcome, read_table, try_decoder
from benchmarks.decoders import DECODERS, Decoder

M = 3
UNITS = [decoder for decoder in DECODERS if decoder.unit is not None]


def test_the_table_has_all_decoders() -> None:
    assert list(read_table()) == [decoder.name for decoder in DECODERS]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_a_decoder_as_published(decoder: Decoder) -> None:
    """One setting of those behind the table: tied or not as published, eager attention, padded targets."""
    outcome = try_decoder(decoder, decoder.published_tied(), M, "eager")
    assert is_said(outcome, read_table()[decoder.name].as_published())


@pytest.mark.parametrize("decoder", UNITS, ids=lambda decoder: decoder.name)
def test_a_decoder_with_a_unit(decoder: Decoder) -> None:
    outcome = try_decoder(decoder, decoder.published_tied(), M, "eager", decoder.unit)
    assert is_said(outcome, read_table()[decoder.name].as_units)


def is_said(outcome: Outcome, cell: str) -> bool:
    return cell == outcome.text or f"m={M}, eager: {outcome.text}" in cell.split("; ")
