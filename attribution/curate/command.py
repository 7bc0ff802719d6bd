"""Make a data folder without the training samples, or documents, of low value.

    python -m attribution.curate RESULT_DIR [RESULT_DIR ...] --drop negative|bottom:0.16|threshold:X
        [--unit samples|documents] --output SHARDS [flags as of attribution.values]

Train on the result with `train.sh --pile_data_dir SHARDS`. Only the shards of the training split that lose
tokens are written; all other files are hard links to the source folder, or copies where the file system has
no links. SHARDS/dropped.parquet lists what was dropped, SHARDS/curation.json why and how much. Samples and
documents without a value, because no step gave them one, are kept.

--unit samples: the shard becomes the first T tokens of every kept block, in order, and then its tail that is
no whole block. Each kept block has the same input as before, but a new number, and so a new sample id. The
last of its T targets is the first token of the block that now follows. Where blocks were dropped in between,
that target changes, and a document begins there without an END_OF_TEXT before it.

--unit documents: every document is kept or dropped as a whole, and blocks are cut anew.

A domain with less than one block left is dropped as a whole.

Of a run on LLaVA records the result is a folder of records; of a loop of one's own it is a data set in Parquet
(curated_dataset.py), in which samples keep their ids.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from attribution.completeness import Window
from attribution.curate.curated_data import curated_data
from attribution.curate.curated_folder import check_output, whole_folder
from attribution.curate.drop_rule import Choice, DropRule, choose
from attribution.database import MEMORY_LIMIT, Normalise, ScoreDatabase
from attribution.options import make_argument_parser, read_options
from attribution.samples import Samples
from attribution.scored_run import ScoredRun
from attribution.screen import first_words, plain_console
from attribution.units import Unit, write_units
from attribution.values import describe_run
from data_processing.shards import write_json_atomically
from foundation.paths import path_argument

FORMAT = {"format": "attribution curation", "format_version": 1}
MANIFEST = "curation.json"
DROPPED = "dropped.parquet"


def curate(
    runs: Sequence[ScoredRun],
    output: Path,
    *,
    drop: str,
    unit: Unit = "samples",
    normalise: Normalise = "none",
    steps: Window = (None, None),
    memory_limit: str = MEMORY_LIMIT,
    pile_data_dir: Path | None = None,
) -> dict[str, Any]:
    """Write the data folder `output`, whole or not at all, and return its manifest.

    Args:
        drop: a rule, as of `DropRule.parse`.
        normalise, steps, memory_limit, pile_data_dir: as of `write_values`.

    Raises:
        AttributionError: the output exists, lies within the source folder or cannot be written; the rule
            leaves nothing; and as `DropRule.parse`, `ScoreDatabase` and `ScoredRun.shards`.
        ShardError: a shard of the source folder is damaged.
    """
    rule = DropRule.parse(drop)
    data = curated_data(runs, pile_data_dir)
    check_output(output, data.source)
    with whole_folder(output) as unfinished:
        with ScoreDatabase(
            runs, memory_limit=memory_limit, steps=steps, normalise=normalise, spill_folder=unfinished
        ) as database:
            choice = choose_units(database, data.samples, unit, rule, unfinished / DROPPED)
            windows = database.windows
        written = data.write(unfinished, unit, choice, unfinished / DROPPED)
        manifest = {
            **describe_choice(drop, unit, choice),
            "normalise": normalise,
            "runs": [describe_run(run, window) for run, window in zip(runs, windows, strict=True)],
            "source": str(data.source.resolve()),
            "to_train": data.to_train(output),
            **written,
        }
        write_json_atomically(unfinished / MANIFEST, manifest)
    return manifest


def describe_choice(drop: str, unit: Unit, choice: Choice) -> dict[str, Any]:
    """Return what a manifest says of what was dropped."""
    return {
        **FORMAT,
        "drop": drop,
        "unit": unit,
        "reason": choice.reason,
        "highest_dropped_value": choice.highest_dropped,
        "lowest_kept_value": choice.lowest_kept,
    }


def choose_units(
    database: ScoreDatabase, samples: Samples, unit: Unit, rule: DropRule, dropped: Path
) -> Choice:
    """Write the file `dropped`. The values for it go to a temporary folder beside it."""
    with tempfile.TemporaryDirectory(prefix=".values-", dir=dropped.parent) as folder:
        units = write_units(database, samples, unit, Path(folder))
        return choose(database, units, unit, rule, dropped)


def print_curation(output: Path, manifest: dict[str, Any]) -> None:
    """Print what was dropped from each domain, and how to train on the result."""
    screen, unit = plain_console(), manifest["unit"]
    screen.print(f"{unit} left out: {manifest['reason']}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("domain", overflow="fold")
    columns: tuple[str, ...] = ("units", "with_value", "dropped", "tokens_before", "tokens_after")
    names: tuple[str, ...] = (unit, "with a value", "left out", "tokens before", "after")
    rows = manifest["domains"]
    in_tokens = all("tokens_after" in row for row in rows.values())
    if not in_tokens:  # records and samples are counted, not their tokens
        columns, names = columns[:3], names[:3]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for name, row in rows.items():
        table.add_row(Text(first_words(name)), *(f"{row[column]:,}" for column in columns), row["state"])
    totals = {column: sum(row[column] for row in rows.values()) for column in columns}
    table.add_row("all", *(f"{total:,}" for total in totals.values()))
    screen.print(table)
    few = "as a whole"
    if in_tokens:
        few += f": fewer than the {manifest['block_size'] + 1} tokens of a block would stay"
    gone = {name for name, row in rows.items() if row["state"] == "left out"}
    for name in gone:
        screen.print(f"domain {first_words(name)} is left out {few}", soft_wrap=True)
    valueless = sum(row["units"] - row["with_value"] for name, row in rows.items() if name not in gone)
    screen.print(f"{unit} that no step gave a value are kept: {valueless:,}", soft_wrap=True)
    if "not_in_it" in manifest:
        screen.print(manifest["not_in_it"], soft_wrap=True)
    screen.print(f"what was left out is listed in {output / DROPPED}", soft_wrap=True)
    screen.print(f"to train on it: {manifest['to_train']}", soft_wrap=True)


def main(argv: list[str]) -> None:
    parser = make_argument_parser(
        "attribution.curate", "Make a data folder without the samples of low value."
    )
    parser.add_argument(
        "--drop", required=True, metavar="RULE", help="negative, bottom:SHARE or threshold:VALUE"
    )
    parser.add_argument(
        "--unit", choices=get_args(Unit), default="samples", help="what to leave out [samples]"
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="SHARDS", help="the new data folder"
    )
    arguments = parser.parse_args(argv)
    options = read_options(arguments)
    chosen = {name: getattr(arguments, name) for name in ("output", "drop", "unit")}
    manifest = curate(**chosen, **vars(options))
    print_curation(arguments.output, manifest)
