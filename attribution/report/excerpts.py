"""The texts that the report shows: of the most extreme samples and documents, and of the validation rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attribution.database import ScoreDatabase
from attribution.report.plots import Unit, unit_for
from attribution.report.tables import samples_of_document, uses_of
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
    """One end of a table: its rows, the most extreme first, and the unit for their values."""

    rows: list[dict[str, Any]]
    unit: Unit


def samples(
    database: ScoreDatabase, values: Values, unit_name: str, blocks: BlockDataset, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Samples with their texts, and the steps in which they were used."""
    helpful, harmful = excerpts_of(values, "samples", unit_name)
    rows = helpful.rows + harmful.rows
    uses = uses_of(database, [row["sample_id"] for row in rows])
    for row in rows:
        row |= {"uses": uses[row["sample_id"]]}
        row |= excerpt(tokenizer, blocks.tokens(row["domain"], row["block"]))
    return {"helpful_samples": helpful, "harmful_samples": harmful, "shown_uses": SHOWN_USES}


def documents(
    database: ScoreDatabase, values: Values, unit_name: str, shards: Sequence[Shard], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Documents with the beginnings of their texts, and when their samples were used."""
    helpful, harmful = excerpts_of(values, "documents", unit_name)
    by_name = {shard.domain: shard for shard in shards}
    for row in helpful.rows + harmful.rows:
        row |= samples_of_document(database, values, row)
        end = row["first_token"] + row["tokens"]
        row |= excerpt(tokenizer, by_name[row["domain"]].tokens[row["first_token"] : end])
    return {"helpful_documents": helpful, "harmful_documents": harmful}


def excerpts_of(values: Values, name: str, unit_name: str) -> tuple[Extremes, Extremes]:
    """Of "samples" or "documents": the most helpful with a value above zero, the most harmful below."""
    highest, lowest = (table.to_pylist() for table in values.extremes(name, EXTREMES))
    helpful = [row for row in highest if row["value"] > 0]
    harmful = [row for row in lowest if row["value"] < 0]
    units = [
        unit_for(max((abs(row["value"]) for row in rows), default=0.0), unit_name)
        for rows in (helpful, harmful)
    ]
    return Extremes(helpful, units[0]), Extremes(harmful, units[1])


def validation_rows(runs: Sequence[ScoredRun], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The validation rows, once for all runs that have the same ones: rows, and the runs' names."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        digest = run.metadata["validation_sha256"]
        if digest not in groups:
            rows = run.validation_rows().to_pylist()
            for row in rows:
                row |= excerpt(tokenizer, row["tokens"])
            groups[digest] = {"rows": rows, "runs": []}
        groups[digest]["runs"].append(run.folder.resolve().name)
    return list(groups.values())


def excerpt(tokenizer: Tokenizer, tokens: Sequence[int]) -> dict[str, Any]:
    """The text of the first SHOWN_TOKENS tokens, and how many there are."""
    shown = [int(token) for token in tokens[:SHOWN_TOKENS]]
    return {"text": tokenizer.decode(shown), "tokens": len(tokens), "shown_tokens": len(shown)}
