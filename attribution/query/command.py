"""Show the value of a text or sample over the run, or the samples that helped one validation row.

    python -m attribution.query RESULT_DIR --text "..."           the training documents that contain it
    python -m attribution.query RESULT_DIR --sample DOMAIN:BLOCK  one training sample
    python -m attribution.query RESULT_DIR --validation J         one validation row, counted from 0; of runs
                                                                  with --score_granularity pairwise

--text searches all training documents byte by byte, including those that the run did not use. A value is the
predicted fall of the validation loss, summed over the steps; positive is helpful.
"""

import tempfile
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from attribution.database import ScoreDatabase
from attribution.documents import locate_document
from attribution.options import RunOptions, make_argument_parser, read_options
from attribution.query.history import (
    Standing,
    find_block_uses,
    find_blocks,
    find_document_uses,
    find_standing,
)
from attribution.query.lookup import (
    find_extreme_pairs,
    find_stored_text,
    find_text,
    find_validation_row,
)
from attribution.query.text_search import Place
from attribution.samples import Samples, StoredSamples
from attribution.screen import plain_console, print_samples, printable
from attribution.units import Unit, write_units
from attribution.words import DIVIDED
from data_processing.shards import Shard
from data_processing.tokenizers import Tokenizer

SHOWN_DOCUMENTS = 10
SHOWN_USES = 20  # of a document, or a sample
SHOWN_SAMPLES = 10  # at either end
CONTEXT_TOKENS = 30  # on either side of a text that was found
FOUND_TOKENS = 100  # of the text itself
SHOWN_TOKENS = 1 << 16  # of a sample


def query_text(options: RunOptions, text: str) -> None:
    """Print the training documents that contain the text, and the values of the first of them.

    Raises as `find_text`, `ScoredRun.shards` and `ScoreDatabase`.
    """
    (run,), screen = options.runs, plain_console()
    samples = run.samples(options.pile_data_dir)
    if isinstance(samples, StoredSamples):
        query_stored_text(options, samples, text)
        return
    documents = samples.documents
    assert documents is not None, "samples are stored, or blocks of documents"
    by_name, tokenizer, size = documents.by_domain, documents.tokenizer, documents.block_size
    places, count = find_text(documents.shards, text, SHOWN_DOCUMENTS)
    screen.print(
        f"{count:,} training documents contain the text"
        + f", of which the first {len(places)} are:" * (count > len(places))
    )
    with tempfile.TemporaryDirectory() as folder, open_scores(options, folder) as database:
        of = "inputs" if database.by_word == "position" else "targets"
        screen.print(
            f"part: how much of a block's {of} is the document's; value: its part of the block's value, which "
            f"is divided {DIVIDED[database.by_word]}",
            soft_wrap=True,
        )
        histories = [
            find_document_uses(database, by_name[place.domain], place.document, size) for place in places
        ]
        units = (
            write_units(database, samples, "documents", Path(folder)) if any(map(len, histories)) else None
        )
        for place, history in zip(places, histories, strict=True):
            shard = by_name[place.domain]
            screen.print()
            print_place(
                screen, shard, place, find_blocks(shard, place.document, size, database.by_word), tokenizer
            )
            own = None
            if units is not None and len(history):
                own = find_standing(database, units, "documents", place.domain, place.document)
            print_history(screen, database, samples, "documents", place.domain, history, own)


def query_stored_text(options: RunOptions, samples: StoredSamples, text: str) -> None:
    """Print the training samples that contain the text, and the values of the first of them.

    Raises as `find_stored_text` and `ScoreDatabase`.
    """
    screen, (places, count) = plain_console(), find_stored_text(samples, text, SHOWN_DOCUMENTS)
    screen.print(
        f"{count:,} training samples contain the text"
        + f", of which the first {len(places)} are:" * (count > len(places))
    )
    with tempfile.TemporaryDirectory() as folder, open_scores(options, folder) as database:
        units = write_units(database, samples, "samples", Path(folder))
        for domain, number in places:
            screen.print()
            print_sample(screen, database, samples, units, domain, number)


def query_sample(options: RunOptions, sample: str) -> None:
    """Print a training sample's text, value and uses.

    Raises as `Samples.find`, `ScoredRun.samples` and `ScoreDatabase`.
    """
    (run,), screen = options.runs, plain_console()
    samples = run.samples(options.pile_data_dir)
    domain, number = samples.find(sample)
    with tempfile.TemporaryDirectory() as folder, open_scores(options, folder) as database:
        units = write_units(database, samples, "samples", Path(folder))
        print_sample(screen, database, samples, units, domain, number)


def print_sample(
    screen: Console, database: ScoreDatabase, samples: Samples, units: Path, domain: str, number: int
) -> None:
    """Print a sample's place, text, image, value and uses. units: the file of samples that `write_units` wrote."""
    screen.print(printable(samples.place(domain, number)), soft_wrap=True)
    screen.print(printable(samples.excerpt(domain, number, SHOWN_TOKENS).text), soft_wrap=True)
    if (image := samples.image(domain, number)) is not None:
        screen.print(str(image), soft_wrap=True)
    history = find_block_uses(database, domain, range(number, number + 1))
    own = find_standing(database, units, "samples", domain, number)
    print_history(screen, database, samples, "samples", domain, history, own)


def query_validation(options: RunOptions, number: int) -> None:
    """Print a validation row, and the samples that helped and hurt it most.

    Raises as `find_validation_row`, `ScoredRun.shards` and `ScoreDatabase`.
    """
    (run,), screen = options.runs, plain_console()
    row, samples = find_validation_row(run, number), run.samples(options.pile_data_dir)
    with tempfile.TemporaryDirectory() as folder, open_scores(options, folder) as database:
        helped, hurt = find_extreme_pairs(database, number, SHOWN_SAMPLES)
    screen.print(f"validation row {number}: {printable(row['domain'])}, {samples.noun} {row['block']}")
    screen.print(printable(row["text"]), soft_wrap=True)
    for title, rows in (("helped", helped), ("hurt", hurt)):
        heading = f"\nsamples that {title} it most: predicted fall of its loss, summed over the steps"
        if len(rows) == 0:
            screen.print(f"\nno sample {title} it")
        else:
            print_samples(screen, {heading: rows}, samples)


def open_scores(options: RunOptions, folder: str) -> ScoreDatabase:
    return ScoreDatabase(
        options.runs,
        memory_limit=options.memory_limit,
        steps=options.steps,
        normalise=options.normalise,
        spill_folder=Path(folder),
    )


def print_place(screen: Console, shard: Shard, place: Place, blocks: range, tokenizer: Tokenizer) -> None:
    """Print where a text was found, with the text around it."""
    first, stop = locate_document(shard, place.document)
    where = (
        f"blocks {blocks.start} to {blocks.stop - 1}" if blocks else "no block, as it is in the shard's tail"
    )
    screen.print(
        f"{printable(shard.domain)}, document {place.document}: tokens {first:,} to {stop - 1:,}, {where}; "
        f"the text begins in token {place.first_token:,}",
        soft_wrap=True,
    )
    begin = max(first, place.first_token - CONTEXT_TOKENS)
    end = min(stop, place.stop_token + CONTEXT_TOKENS, place.first_token + FOUND_TOKENS)
    words = printable(tokenizer.decode(shard.tokens[begin:end].tolist()))
    screen.print("…" * (begin > first) + words + "…" * (end < stop), soft_wrap=True)


def print_history(
    screen: Console,
    database: ScoreDatabase,
    samples: Samples,
    unit: Unit,
    domain: str,
    history: pa.Table,
    own: Standing | None,
) -> None:
    """Print a unit's value, its rank and its uses.

    Args:
        history: its uses, by step.
        own: None if it has no value.
    """
    first, last = database.windows[0]
    if len(history) == 0:
        elsewhere = ""
        if samples.used is not None and domain not in samples.used:
            elsewhere = f": it trained on {', '.join(map(printable, samples.used))}"
        screen.print(f"never trained on in steps {first} to {last}{elsewhere}", soft_wrap=True)
        return
    if own is None:
        screen.print("no value: the optimizer skipped the steps in which it was used")
    else:
        screen.print(
            f"value {own.value:+.3e} in steps {first} to {last}, rank {own.rank:,} of {own.count:,} {unit} "
            f"with a value, higher than {own.lower:.1%} of them",
            soft_wrap=True,
        )
    print_uses(screen, history)


def print_uses(screen: Console, history: pa.Table) -> None:
    """Print the first uses, one line each. A document's uses show its share of the block's targets (or inputs)."""
    headings = {
        "step": "step", "block": "block", "share": "part", "train_loss": "train loss", "lr": "lr",
        "dot_product": "dot product", "value": "value",
    }  # fmt: skip
    formats = {"step": "{}", "block": "{}", "share": "{:.0%}", "train_loss": "{:.4f}", "lr": "{:.3e}"}
    columns = [name for name in headings if name in history.column_names]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(headings[name], justify="right", no_wrap=True)
    for row in history.slice(0, SHOWN_USES).to_pylist():
        shown = [
            "skipped" if row[name] is None else formats.get(name, "{:+.3e}").format(row[name])
            for name in columns
        ]
        table.add_row(*shown)
    screen.print(table)
    if len(history) > SHOWN_USES:
        screen.print(f"and {len(history) - SHOWN_USES:,} more uses")


def main(argv: list[str]) -> None:
    parser = make_argument_parser(
        "attribution.query", "Values of a run by text, sample or validation row.", several=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="the training documents that contain it, and their values")
    what.add_argument("--sample", metavar="DOMAIN:BLOCK", help="a training sample, its value and its uses")
    what.add_argument(
        "--validation", type=int, metavar="J", help="a validation row, from 0: who helped it (pairwise runs)"
    )
    arguments = parser.parse_args(argv)
    options = read_options(arguments)
    if arguments.text is not None:
        query_text(options, arguments.text)
    elif arguments.sample is not None:
        query_sample(options, arguments.sample)
    else:
        query_validation(options, arguments.validation)
