"""A data folder without the training samples, or documents, whose value says so.

    python -m attribution.curate RESULT_DIR [RESULT_DIR ...] --drop negative|bottom:0.16|threshold:X
        [--unit samples|documents] --output SHARDS [flags as of attribution.values]

`train.sh --pile_data_dir SHARDS` runs on it as on any other. The training split is written anew; a domain of
which nothing was chosen, and all other splits, are the files of the source folder (hard links where the file
system has them). SHARDS/dropped.parquet lists what was left out, SHARDS/curation.json says why and how much.
What has no value, because the run did not use it, stays.

--unit samples: the first T tokens of every block that stays, one after the other, then the shard's tail that
is no block. So each is a block again, with the same input; its number, and with it the sample id, is another.
The last of its T targets is the next block's first token: where blocks were left out in between, another one
than before. There a document begins without an END_OF_TEXT before it.
--unit documents: every document is there as a whole, or not at all; blocks are cut anew.

A domain of which less than a block is left is left out as a whole.
"""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from attribution.completeness import Window
from attribution.curate.curated_folder import check_output, other_splits, plan, whole_folder, write_splits
from attribution.curate.drop_rule import Choice, DropRule, choose
from attribution.database import MEMORY_LIMIT, Normalise, ScoreDatabase
from attribution.options import argument_parser, run_options
from attribution.scored_run import ScoredRun
from attribution.screen import first_words, plain_console
from attribution.units import Unit, write_units
from attribution.values import description
from data_processing.shards import Shard, list_shards, write_json_atomically
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
    """Writes the data folder `output`, which appears whole or not at all, and returns its manifest.

    drop: as of `DropRule.parse`; the rest as of `write_values`.

    Raises:
        AttributionError: the output is there already, lies within the source folder or cannot be written; the
        rule leaves nothing; and what `DropRule.parse`, `ScoreDatabase` and `ScoredRun.shards` raise.
        ShardError: a shard of the source folder is damaged.
    """
    rule = DropRule.parse(drop)
    shards, block_size, split = runs[0].shards(pile_data_dir), runs[0].block_size, runs[0].split
    source = shards[0].path.parent.parent
    others = other_splits(source, split)
    check_output(output, source)
    options = {"memory_limit": memory_limit, "steps": steps, "normalise": normalise}
    with whole_folder(output) as unfinished:
        with ScoreDatabase(runs, **options, spill_folder=unfinished) as database:
            choice = choose_units(database, shards, unit, rule, unfinished / DROPPED)
            windows = database.windows
        cuts = plan(shards, choice, unit, block_size)
        write_splits(unfinished, others, cuts, unfinished / DROPPED)
        tokens = {shard.domain: shard.num_tokens for shard in list_shards(unfinished, split)}
        manifest = {
            **FORMAT,
            "drop": drop,
            "unit": unit,
            "reason": choice.reason,
            "highest_dropped_value": choice.highest_dropped,
            "lowest_kept_value": choice.lowest_kept,
            "normalise": normalise,
            "runs": [description(run, window) for run, window in zip(runs, windows, strict=True)],
            "source": str(source.resolve()),
            "split": split,
            "block_size": block_size,
            "domains": {each.shard.domain: each.describe(tokens.get(each.shard.domain, 0)) for each in cuts},
        }
        write_json_atomically(unfinished / MANIFEST, manifest)
    return manifest


def choose_units(
    database: ScoreDatabase, shards: Sequence[Shard], unit: Unit, rule: DropRule, dropped: Path
) -> Choice:
    """Writes the file `dropped`; the values that this takes are in a folder beside it for as long."""
    with tempfile.TemporaryDirectory(prefix=".values-", dir=dropped.parent) as folder:
        units = write_units(database, shards, unit, Path(folder))
        return choose(database, units, unit, rule, database.runs[0].block_size, dropped)


def print_curation(output: Path, manifest: dict[str, Any]) -> None:
    """What became of each domain, and how to train on the result."""
    screen, unit = plain_console(), manifest["unit"]
    screen.print(f"{unit} left out: {manifest['reason']}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("domain", overflow="fold")
    for name in (unit, "with a value", "left out", "tokens before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    columns = ("units", "with_value", "dropped", "tokens_before", "tokens_after")
    rows = manifest["domains"]
    for name, row in rows.items():
        table.add_row(Text(first_words(name)), *(f"{row[column]:,}" for column in columns), row["state"])
    totals = {column: sum(row[column] for row in rows.values()) for column in columns}
    table.add_row("all", *(f"{total:,}" for total in totals.values()))
    screen.print(table)
    few = f"as a whole: fewer than the {manifest['block_size'] + 1} tokens of a block would stay"
    gone = {name for name, row in rows.items() if row["state"] == "left out"}
    for name in gone:
        screen.print(f"domain {first_words(name)} is left out {few}", soft_wrap=True)
    valueless = sum(row["units"] - row["with_value"] for name, row in rows.items() if name not in gone)
    screen.print(f"{unit} that no step gave a value are kept: {valueless:,}", soft_wrap=True)
    screen.print(f"what was left out is listed in {output / DROPPED}", soft_wrap=True)
    screen.print(
        f"to train on it: ./Scripts/train.sh --pile_data_dir {shlex.quote(str(output))}", soft_wrap=True
    )


def main(argv: list[str]) -> None:
    parser = argument_parser("attribution.curate", "A data folder without the samples whose value says so.")
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
    options = run_options(arguments)
    chosen = {name: getattr(arguments, name) for name in ("output", "drop", "unit")}
    manifest = curate(**chosen, **vars(options))
    print_curation(arguments.output, manifest)
