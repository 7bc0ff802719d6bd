"""Choose the samples or documents to drop: parse --drop and apply it in the database."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from attribution.database import ScoreDatabase, parquet, quoted
from attribution.errors import AttributionError
from attribution.units import NUMBER, Unit

# The columns that order units of equal value.
ORDER = {"samples": "sample_id", "documents": "domain, document"}
COLUMNS = {
    "samples": "domain, sample_id, block, value",
    "documents": "domain, document, first_token, tokens, value",
}


@dataclass(frozen=True)
class DropRule:
    """A rule of --drop. Units without a value are kept.

    negative: value < 0
    threshold:X: value < X
    bottom:Q: the floor(Q·N) lowest of the N units with a value; the lower number first among equal values
    """

    text: str  # as given
    kind: str  # negative, threshold or bottom
    number: Decimal  # 0, X or Q

    @classmethod
    def parse(cls, text: str) -> "DropRule":
        """Parse a rule. Raises AttributionError if it is none of the three."""
        kind, _, given = text.partition(":")
        if text == "negative":
            return cls(text, kind, Decimal(0))
        try:
            number = Decimal(given)
        except InvalidOperation:
            number = Decimal("NaN")
        if kind == "bottom" and number.is_finite() and 0 < number <= 1:
            return cls(text, kind, number)
        if kind == "threshold" and number.is_finite() and math.isfinite(float(number)):
            return cls(text, kind, number)
        raise AttributionError(
            f"--drop {text!r}: say negative, bottom:Q with a share Q above 0 and at most 1, as in "
            "bottom:0.16, or threshold:X with a value X, as in threshold:-1e-6"
        )

    def count(self, with_value: int) -> int:
        """Return floor(Q·N), in decimals: in binary floating point 0.29 of 100 would be 28."""
        return int(self.number * with_value)

    def reason(self, with_value: int) -> str:
        """Return the rule in words. with_value: N."""
        if self.kind == "bottom":
            return f"among the {self.count(with_value)} lowest of {with_value} values"
        return f"value < {self.number}"


@dataclass(frozen=True)
class Choice:
    """The units that a rule chose."""

    with_value: dict[str, int]  # domain -> number of units with a value
    dropped: dict[str, int]  # domain -> number of dropped units; none: not a key
    dropped_tokens: dict[str, int]  # domain -> their tokens, of documents
    reason: str  # the rule in words
    highest_dropped: float | None  # value; None if nothing is dropped
    lowest_kept: float | None  # value; None if no unit with a value is kept


def choose(database: ScoreDatabase, units: Path, unit: Unit, rule: DropRule, target: Path) -> Choice:
    """Write the units that the rule drops, sorted.

    Args:
        units: samples.parquet or documents.parquet of a folder of values.
        target: the Parquet file to write, with the columns of COLUMNS and `reason`.
    """
    table, chosen = parquet(units), parquet(target)
    doing = f"choosing {unit}"
    with_value = _query_by_domain(database, f"SELECT domain, count(value) FROM {table} GROUP BY domain")
    condition = _condition(database, table, unit, rule, sum(with_value.values()))
    reason = rule.reason(sum(with_value.values()))
    database.write(
        f"SELECT {COLUMNS[unit]}, {quoted(reason)} AS reason FROM {table} WHERE {condition} "
        f"ORDER BY {ORDER[unit]}",
        target,
        doing,
    )
    tokens = f"SELECT domain, sum(tokens)::BIGINT FROM {chosen} GROUP BY domain"
    kept = f"SELECT min(value) FROM {table} WHERE NOT ({condition})"
    return Choice(
        with_value=with_value,
        dropped=_query_by_domain(database, f"SELECT domain, count(*) FROM {chosen} GROUP BY domain"),
        dropped_tokens=_query_by_domain(database, tokens) if unit == "documents" else {},
        reason=reason,
        highest_dropped=_query_number(database.query(f"SELECT max(value) FROM {chosen}", doing)),
        lowest_kept=_query_number(database.query(kept, doing)),
    )


def _query_by_domain(database: ScoreDatabase, sql: str) -> dict[str, int]:
    domains, numbers = database.query(f"{sql} ORDER BY domain", "counting").columns
    return dict(zip(domains.to_pylist(), numbers.to_pylist(), strict=True))


def _query_number(table: pa.Table) -> float | None:
    number: float | None = table.column(0)[0].as_py()
    return number


def _condition(database: ScoreDatabase, table: str, unit: Unit, rule: DropRule, with_value: int) -> str:
    """Return the rule as an SQL condition.

    Numbers are cast from strings: SQL reads 0.1 as a decimal, which may convert to another double.
    """
    if rule.kind != "bottom":
        return f"value < {quoted(float(rule.number))}::DOUBLE"
    count = rule.count(with_value)
    if count == 0:
        return "false"
    keys = f"value, {ORDER[unit]}"
    last = f"SELECT {keys} FROM {table} WHERE value IS NOT NULL ORDER BY {keys} LIMIT 1 OFFSET {count - 1}"
    value, *order = database.query(last, "sorting values").to_pylist()[0].values()
    shown = ", ".join(
        [f"{quoted(value)}::DOUBLE", *(quoted(key) if isinstance(key, str) else str(key) for key in order)]
    )
    return f"value IS NOT NULL AND ({keys}) <= ({shown})"


def describe_domain(choice: Choice, domain: str, units: int) -> dict[str, Any]:
    """Return a domain's entry in the manifest. units: how many it has, with a value or not."""
    dropped = choice.dropped.get(domain, 0)
    return {
        "state": "unchanged" if dropped == 0 else ("left out" if dropped == units else "cut"),
        "units": units,
        "with_value": choice.with_value.get(domain, 0),
        "dropped": dropped,
    }


def read_dropped_ids(target: Path) -> npt.NDArray[np.int64]:
    """Return the ids of the dropped samples, ascending."""
    ids: npt.NDArray[np.int64] = pq.read_table(target, columns=["sample_id"])["sample_id"].to_numpy()
    return ids


def read_dropped_numbers(target: Path, unit: Unit, domain: str) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the numbers of a domain's dropped units, ascending, in pieces."""
    scanner = ds.dataset(target, format="parquet").scanner(
        columns=[NUMBER[unit]], filter=ds.field("domain") == domain
    )
    for batch in scanner.to_batches():
        yield batch.column(0).to_numpy()
