"""Which samples or documents to leave out: the rules of --drop, and the choice in the database."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from attribution.database import ScoreDatabase, parquet, quoted
from attribution.scored_run import AttributionError
from attribution.units import NUMBER, Unit

# The columns whose order decides between equal values.
ORDER = {"samples": "sample_id", "documents": "domain, document"}
COLUMNS = {
    "samples": "domain, sample_id, block, value",
    "documents": "domain, document, first_token, tokens, value",
}


@dataclass(frozen=True)
class DropRule:
    """`negative`: value < 0; `threshold:X`: value < X; `bottom:Q`: of the N units with a value the floor(Q·N)
    lowest, equal ones in the order of their numbers. A unit without a value stays."""

    text: str
    kind: str
    number: Decimal

    @classmethod
    def parse(cls, text: str) -> "DropRule":
        """Raises AttributionError for anything but those three."""
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
        """floor(Q·N), in decimals: 0.29 of 100 are 29, and 28 by way of binary numbers."""
        return int(self.number * with_value)

    def reason(self, with_value: int) -> str:
        """In words; with_value: N."""
        if self.kind == "bottom":
            return f"among the {self.count(with_value)} lowest of {with_value} values"
        return f"value < {self.number}"


@dataclass(frozen=True)
class Choice:
    """What a rule chose. with_value, dropped, dropped_tokens: of each domain that has any; reason: in words;
    highest_dropped, lowest_kept: values, None where there is none."""

    with_value: dict[str, int]
    dropped: dict[str, int]
    dropped_tokens: dict[str, int]
    reason: str
    highest_dropped: float | None
    lowest_kept: float | None


def choose(
    database: ScoreDatabase, units: Path, unit: Unit, rule: DropRule, block_size: int, target: Path
) -> Choice:
    """Writes the units that the rule drops, sorted, with the reason. units: samples.parquet or
    documents.parquet; target: has the columns of COLUMNS, and `reason`."""
    table, chosen = parquet(units), parquet(target)
    doing = f"choosing {unit}"
    with_value = _of_domains(database, f"SELECT domain, count(value) FROM {table} GROUP BY domain")
    condition = _condition(database, table, unit, rule, sum(with_value.values()))
    reason = rule.reason(sum(with_value.values()))
    database.write(
        f"SELECT {COLUMNS[unit]}, {quoted(reason)} AS reason FROM {table} WHERE {condition} "
        f"ORDER BY {ORDER[unit]}",
        target,
        doing,
    )
    tokens = f"count(*) * {block_size}" if unit == "samples" else "sum(tokens)::BIGINT"
    kept = f"SELECT min(value) FROM {table} WHERE NOT ({condition})"
    return Choice(
        with_value=with_value,
        dropped=_of_domains(database, f"SELECT domain, count(*) FROM {chosen} GROUP BY domain"),
        dropped_tokens=_of_domains(database, f"SELECT domain, {tokens} FROM {chosen} GROUP BY domain"),
        reason=reason,
        highest_dropped=_only(database.query(f"SELECT max(value) FROM {chosen}", doing)),
        lowest_kept=_only(database.query(kept, doing)),
    )


def _of_domains(database: ScoreDatabase, sql: str) -> dict[str, int]:
    domains, numbers = database.query(f"{sql} ORDER BY domain", "counting").columns
    return dict(zip(domains.to_pylist(), numbers.to_pylist(), strict=True))


def _only(table: pa.Table) -> float | None:
    return table.column(0)[0].as_py()


def _condition(database: ScoreDatabase, table: str, unit: Unit, rule: DropRule, with_value: int) -> str:
    """SQL. Numbers are written as strings: SQL takes 0.1 for a decimal, whose way to binary is another."""
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


def dropped_numbers(target: Path, unit: Unit, domain: str) -> Iterator[npt.NDArray[np.int64]]:
    """The numbers of a domain's dropped units, ascending, in pieces."""
    scanner = ds.dataset(target, format="parquet").scanner(
        columns=[NUMBER[unit]], filter=ds.field("domain") == domain
    )
    for batch in scanner.to_batches():
        yield batch.column(0).to_numpy()
