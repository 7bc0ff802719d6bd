"""Collect the texts that the report shows: of extreme samples and documents, and of the validation rows."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from attribution.database import ScoreDatabase
from attribution.report.plots import Scale, choose_scale
from attribution.report.tables import count_document_uses, find_sample_uses
from attribution.report.texts import describe_words
from attribution.report.word_colours import colour_words
from attribution.samples import Samples, excerpt_of
from attribution.scored_run import ScoredRun
from attribution.values_folder import Values
from attribution.words import read_parts
from data_processing.images import small_png

EXTREMES = 10  # at either end
SHOWN_TOKENS = 2048  # of a text
SHOWN_USES = 12  # of a sample


@dataclass(frozen=True)
class Extremes:
    """One end of a table of values."""

    rows: list[dict[str, Any]]  # the most extreme first
    scale: Scale  # for their values


def collect_samples(
    database: ScoreDatabase, values: Values, value_unit: str, samples: Samples
) -> dict[str, Any]:
    """Return the most extreme samples, with their texts and the steps in which they were used."""
    helpful, harmful = find_extremes(values, "samples", value_unit)
    rows = helpful.rows + harmful.rows
    colour_samples(rows, values, value_unit, samples)
    uses = find_sample_uses(database, [row["sample_id"] for row in rows])
    for row in rows:
        row |= {"uses": uses[row["sample_id"]]}
        row |= vars(samples.excerpt(row["domain"], row["block"], SHOWN_TOKENS))
        row["image"] = thumbnail(samples.image(row["domain"], row["block"]))
    coloured = any(row["words"] is not None for row in rows)
    return {
        "helpful_samples": helpful,
        "harmful_samples": harmful,
        "shown_uses": SHOWN_USES,
        "words_legend": describe_words(values.by_word, database.runs, coloured),
    }


def colour_samples(rows: Sequence[dict[str, Any]], values: Values, value_unit: str, samples: Samples) -> None:
    """Give each row of "samples" its text in coloured words: "words", None where they are not known."""
    by_word = values.by_word
    found = {} if by_word is None else read_parts(values.path("words"), [row["sample_id"] for row in rows])
    for row in rows:
        parts, row["words"] = found.get(row["sample_id"]), None
        if by_word is None or parts is None:
            continue
        pieces = samples.pieces(row["domain"], row["block"], SHOWN_TOKENS)
        if pieces is not None:
            row["words"] = colour_words(pieces.words(parts, by_word), value_unit)


def collect_documents(
    database: ScoreDatabase, values: Values, value_unit: str, samples: Samples
) -> dict[str, Any]:
    """Return the most extreme documents, with the beginnings of their texts and the uses of their samples."""
    helpful, harmful = find_extremes(values, "documents", value_unit)
    for row in helpful.rows + harmful.rows:  # none where samples have no documents
        documents = samples.documents
        assert documents is not None
        row |= count_document_uses(database, values, row, documents.block_size)
        end = row["first_token"] + row["tokens"]
        tokens = documents.by_domain[row["domain"]].tokens[row["first_token"] : end].tolist()
        row |= vars(excerpt_of(documents.tokenizer, tokens, SHOWN_TOKENS)) | {"image": None, "words": None}
    return {"helpful_documents": helpful, "harmful_documents": harmful}


def find_extremes(values: Values, name: str, value_unit: str) -> tuple[Extremes, Extremes]:
    """Return the most helpful rows, with values above zero, and the most harmful ones, below zero.

    Args:
        name: "samples" or "documents".
    """
    highest, lowest = (table.to_pylist() for table in values.extremes(name, EXTREMES))
    helpful = [row for row in highest if row["value"] > 0]
    harmful = [row for row in lowest if row["value"] < 0]
    # One scale for both ends, so that their numbers can be compared.
    scale = choose_scale(max((abs(row["value"]) for row in helpful + harmful), default=0.0), value_unit)
    return Extremes(helpful, scale), Extremes(harmful, scale)


def collect_validation_rows(runs: Sequence[ScoredRun]) -> list[dict[str, Any]]:
    """Return groups of runs with the same validation rows: "rows" with their texts, "runs" with the names."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        digest = run.metadata["validation_sha256"]
        if digest not in groups:
            rows = run.validation_rows().to_pylist()
            for row in rows:
                row |= {"tokens": len(row["tokens"]), "shown_tokens": len(row["tokens"]), "words": None}
                row["image"] = data_url(row["image"]) if row.get("image") else None
            groups[digest] = {"rows": rows, "runs": []}
        groups[digest]["runs"].append(run.folder.resolve().name)
    return list(groups.values())


def thumbnail(path: Path | None) -> str | None:
    """Return a small copy of an image as a data URL."""
    if path is None:
        return None
    with Image.open(path) as image:
        return data_url(small_png(image))


def data_url(png: bytes) -> str:
    """Return a PNG as a URL that holds it: the page needs no other file."""
    return f"data:image/png;base64,{b64encode(png).decode()}"
