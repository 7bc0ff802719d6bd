"""Collect the texts that the report shows: of extreme samples and documents, and of the validation rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attribution.database import ScoreDatabase
from attribution.report.plots import Scale, choose_scale
from attribution.report.tables import count_document_uses, find_sample_uses
from attribution.scored_run import ScoredRun
from attribution.values_folder import Values
from data_processing.blocks import BlockDataset
from data_processing.shards import Shard
from data_processing.tokenizers import Tokenizer

EXTREMES = 10  # at either end
SHOWN_TOKENS = 2048  # of a text
SHOWN_USES = 12  # of a sample


@dataclass(frozen=True)
class Extremes:
    """One end of a table of values."""

    rows: list[dict[str, Any]]  # the most extreme first
    scale: Scale  # for their values


def collect_samples(
    database: ScoreDatabase, values: Values, value_unit: str, blocks: BlockDataset, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the most extreme samples, with their texts and the steps in which they were used."""
    helpful, harmful = find_extremes(values, "samples", value_unit)
    rows = helpful.rows + harmful.rows
    uses = find_sample_uses(database, [row["sample_id"] for row in rows])
    for row in rows:
        row |= {"uses": uses[row["sample_id"]]}
        row |= decode_excerpt(tokenizer, blocks.tokens(row["domain"], row["block"]))
    return {"helpful_samples": helpful, "harmful_samples": harmful, "shown_uses": SHOWN_USES}


def collect_documents(
    database: ScoreDatabase, values: Values, value_unit: str, shards: Sequence[Shard], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the most extreme documents, with the beginnings of their texts and the uses of their samples."""
    helpful, harmful = find_extremes(values, "documents", value_unit)
    by_name = {shard.domain: shard for shard in shards}
    for row in helpful.rows + harmful.rows:
        row |= count_document_uses(database, values, row)
        end = row["first_token"] + row["tokens"]
        row |= decode_excerpt(tokenizer, by_name[row["domain"]].tokens[row["first_token"] : end])
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


def collect_validation_rows(runs: Sequence[ScoredRun], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return groups of runs with the same validation rows: "rows" with their texts, "runs" with the names."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        digest = run.metadata["validation_sha256"]
        if digest not in groups:
            rows = run.validation_rows().to_pylist()
            for row in rows:
                row |= decode_excerpt(tokenizer, row["tokens"])
            groups[digest] = {"rows": rows, "runs": []}
        groups[digest]["runs"].append(run.folder.resolve().name)
    return list(groups.values())


def decode_excerpt(tokenizer: Tokenizer, tokens: Sequence[int] | npt.NDArray[np.uint16]) -> dict[str, Any]:
    """Return the text of the first SHOWN_TOKENS tokens, the number of all tokens and of those shown."""
    shown = [int(token) for token in tokens[:SHOWN_TOKENS]]
    return {"text": tokenizer.decode(shown), "tokens": len(tokens), "shown_tokens": len(shown)}
