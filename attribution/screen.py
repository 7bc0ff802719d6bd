"""Print domains and samples to the terminal."""

from collections.abc import Mapping

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.samples import Samples

FIRST_TOKENS = 200  # decoded to show a sample's first words
FIRST_CHARACTERS = 100


def plain_console() -> Console:
    """Return a console that prints plain text to standard output."""
    return Console(highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """Return the text on one line, without control characters and marks of writing direction."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def first_words(text: str) -> str:
    """Return the beginning of a text, on one line."""
    return printable(text)[:FIRST_CHARACTERS]


def print_samples(screen: Console, extremes: Mapping[str, pa.Table], samples: Samples) -> None:
    """Print one line per sample, with its first words.

    Args:
        extremes: title -> rows with domain, block, value.
    """
    for title, rows in extremes.items():
        table = Table.grid(padding=(0, 2))
        for row in rows.to_pylist():
            text = samples.excerpt(row["domain"], row["block"], FIRST_TOKENS).text
            words = Text(first_words(text), no_wrap=True)
            words.overflow = "ellipsis"
            table.add_row(
                f"{row['value']:+.3e}", f"{printable(row['domain'])}, {samples.noun} {row['block']}", words
            )
        screen.print(title if len(rows) else f"{title}: none", soft_wrap=True)
        screen.print(table)


def print_domains(screen: Console, domains: pa.Table) -> None:
    """Print the table of domains of a folder of values."""
    table = Table(box=None, pad_edge=False)
    table.add_column("domain", overflow="fold")
    for name in ("samples", "uses", "value", "mean value", "negative", "of |value|"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in domains.to_pylist():
        numbers = (
            f"{row['samples']:,}",
            f"{row['uses']:,}",
            *map(_number, (row["value"], row["mean_value"])),
        )
        shares = map(_percent, (row["share_negative"], row["share_of_absolute"]))
        table.add_row(Text(first_words(row["domain"])), *numbers, *shares)
    screen.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3e}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
