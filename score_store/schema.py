"""The columns of the scores."""

from typing import Literal

import pyarrow as pa

from foundation.errors import UserError
from foundation.granularity import GRANULARITIES

# Columns whose values repeat. The others are written 40 % faster, and 20 % smaller, without a dictionary.
OF_STEP = ["of_batch", "momentum", "decay", "measured_fall", "cosine"]  # what an audit knows of a whole step
DICTIONARY_COLUMNS = [
    "step", "domain", "rank", "val_loss", "lr", "clip_factor", "global_batch_size", *OF_STEP
]  # fmt: skip

FORMAT = {"format": "ghostEngines scores", "format_version": "5"}  # in the schema metadata of every file
# What files of older versions lack, which can be read all the same; `value` in those of version 2 is of another kind
# (attribution.scored_run).
LACKING = {
    "2": ("row_weight", "exact_value", *OF_STEP),
    "3": ("row_weight", "of_batch"),
    "4": ("row_weight",),
}
EQUAL_WEIGHT = "1.0 / global_batch_size"  # SQL for the row_weight of scores that lack it
NATS = "lr * clip_factor * row_weight"  # SQL for the factor that makes nats of dot products
IN_PASS = f"{NATS} * dot_product"  # SQL for a row's value in pass
BY_TARGET = "by_target"  # in the metadata of the scores of a run with the column of this name:
TARGET_COLUMN = "target_value"

ValueKind = Literal["in_pass", "exact"]
"""What `value` is: of the backward pass that training makes, or the exact share of the optimizer's step."""

WordSplit = Literal["target", "position"]
"""How scores split a value by word: by what each target of a row did, or by the position at which a weight was used."""


class ScoreError(UserError):
    """A folder of scores is not what it should be; the message names the file and what to do."""


def score_schema(granularity: str = "total", by_target: bool = False) -> pa.Schema:
    """Return the columns of score files.

    Every row has one dot product over all parameters and all validation rows. "pairwise" adds a list of m, one for each
    validation row, whose mean it is. "per_layer" adds one for each layer, and "token" one for each position of the row,
    whose sum it is.

    Args:
        by_target: every exact value has a list of its parts, one for each of the row's targets, whose sum it is.
    """
    if granularity not in GRANULARITIES:
        raise ScoreError(f"granularity {granularity!r}: there are {', '.join(GRANULARITIES)}")
    columns = {
        "step": pa.int64(),
        "sample_id": pa.int64(),
        "domain": pa.dictionary(pa.int32(), pa.string()),
        "block": pa.int64(),
        "rank": pa.int32(),
        # null: the optimizer did not step, or is not known to (AdamW's first step); or the row's weight is zero
        "dot_product": pa.float64(),
        "train_loss": pa.float64(),
        # Mean over the validation rows at the parameters before the step; null: not computed there in this step.
        "val_loss": pa.float64(),
        "lr": pa.float64(),
        "clip_factor": pa.float64(),
        "global_batch_size": pa.int32(),
        "row_weight": pa.float64(),  # of the row's loss in the step's; 1 / global_batch_size if all rows count the same
        # The fall of the validation loss, in nats, that the row makes in the step: positive helps. In pass it is
        # lr · clip_factor · row_weight · dot_product, null with dot_product; exact, it is exact_value.
        "value": pa.float64(),
        "exact_value": pa.float64(),  # null in steps that are not audited, and for rows that an audit leaves out
        # What makes the loss fall in an audited step: the whole batch, earlier gradients, and weight decay; the fall
        # that was measured; and the cosine between the validation gradients before and after the batch's part.
        **dict.fromkeys(OF_STEP, pa.float64()),
    }
    nullable = ["dot_product", "val_loss", "value", "exact_value", *OF_STEP]
    if granularity != "total":
        columns[granularity] = pa.list_(pa.float64())
        nullable.append(granularity)
    if by_target:  # part t is what the target of position t adds, null with exact_value
        columns[TARGET_COLUMN] = pa.list_(pa.float64())
        nullable.append(TARGET_COLUMN)
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in columns.items()])


SCORE_SCHEMA = score_schema()
