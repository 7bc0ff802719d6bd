"""Query the scores of one or several runs in DuckDB.

    with ScoreDatabase(runs, normalise="absolute", steps=(100, None)) as database:
        database.query("SELECT domain, fsum(weighted_value) FROM scores GROUP BY domain", "summing domains")

The scores may be larger than memory: DuckDB reads the columns it needs in pieces, on all cores, and spills to
the disk.

Threads add in a changing order, so the last digits of plain sums change between calls. Use fsum, which
compensates for rounding (Kahan) and is the same each time.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from typing import Literal, Self, TypeVar

import duckdb
import pyarrow as pa

from attribution.completeness import Window, check_steps, check_window
from attribution.errors import AttributionError
from attribution.scored_run import ScoredRun, same_samples
from foundation.progress import progress_bar
from score_store.schema import EQUAL_WEIGHT, IN_PASS, NATS, TARGET_COLUMN, WordSplit

Normalise = Literal["none", "absolute", "predicted"]

MEMORY_LIMIT = "4GB"
POLL_SECONDS = 0.2
# SQL for the factor on a step's values. All values of a step may be 0 (learning rate 0).
WEIGHTS: dict[Normalise, str] = {
    "none": "1.0",
    "absolute": "CASE WHEN absolute = 0 THEN 0 ELSE 1 / absolute END",
    "predicted": "CASE WHEN predicted = 0 THEN 0 ELSE 1 / abs(predicted) END",
}
# The column of parts, and SQL for what makes parts of the value of them.
PARTS: dict[WordSplit, tuple[str, str]] = {"target": (TARGET_COLUMN, "1.0"), "position": ("token", NATS)}
Result = TypeVar("Result")


class ScoreDatabase:
    """Open the scores of a window of steps, as a context manager with two tables.

    scores: the score rows of the window
        run             number of the run, in the order given, from 0
        ...             all columns of the score files; null in runs without the column. domain is an ENUM, which
                        takes a few bytes in a sum where its name would take many: write domain::VARCHAR to a file
        weighted_value  the value times its step's weight
        parts, part_factor  its split by word: parts times part_factor add up to weighted_value; only if all runs have
                        the same split (`by_word`)
    steps: one row per run and step of the window
        run, step, lr, clip_factor, val_loss
        train_loss      mean over the samples
        predicted       Σ values; null if the step has none
        absolute        Σ |values|
        measured        fall of the validation loss until the next step; null in a run's last step
        rows            number of score rows
        expected        the global batch size
        damaged         number of rows whose value is not the product of its factors, or not the exact value
        weight          1 for normalise "none", 1 / Σ|values| for "absolute", 1 / |Σ values| for "predicted"

    Raises:
        AttributionError: the runs have different data; the scores do not cover the window; a step is
            incomplete; the memory limit is malformed or too low.
    """

    def __init__(
        self,
        runs: Sequence[ScoredRun],
        *,
        memory_limit: str = MEMORY_LIMIT,
        steps: Window = (None, None),
        normalise: Normalise = "none",
        spill_folder: Path | None = None,
    ) -> None:
        """Check the runs and the window; `with` opens the database.

        Args:
            steps: the window, both ends included.
            spill_folder: parent of the folder for data that exceeds the memory limit; None: the system's
                temporary folder.
        """
        same_samples(runs)
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory_limit):
            raise AttributionError(f"--memory_limit {memory_limit!r}: give a number and a unit, as in 4GB")
        self.runs = runs
        splits = {run.by_word for run in runs}
        self.by_word = splits.pop() if len(splits) == 1 else None  # the split that all runs have
        self.windows = [check_window(run, steps) for run in runs]
        self._memory_limit, self._normalise, self._spill_folder = memory_limit, normalise, spill_folder
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            spill = opened.enter_context(
                tempfile.TemporaryDirectory(prefix=".spill-", dir=self._spill_folder)
            )
            settings: dict[str, str | bool | int | float | list[str]] = {
                "memory_limit": self._memory_limit,
                "temp_directory": spill,
            }
            self.connection = opened.enter_context(duckdb.connect(config=settings))
            self.connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
            self._worker = opened.enter_context(ThreadPoolExecutor(1, "duckdb"))
            self._create_tables()
            for number, (run, window) in enumerate(zip(self.runs, self.windows, strict=True)):
                check_steps(self.connection, number, run, window)
            self._resources = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def query(self, sql: str, doing: str, parameters: Sequence[object] = ()) -> pa.Table:
        """Return the result of a query, in memory. doing: the progress bar's label."""
        return self._run(lambda: self.connection.sql(sql, params=list(parameters)).to_arrow_table(), doing)

    def create(self, table: str, sql: str, doing: str) -> None:
        """Create a table from a query. It may be larger than memory."""
        self._run(lambda: self.connection.execute(f"CREATE TABLE {table} AS {sql}"), doing)

    def write(self, sql: str, path: Path, doing: str, rows: int = 122_880) -> None:
        """Write the result of a query to a Parquet file. It may be larger than memory.

        Args:
            rows: in a row group, which are held in memory.
        """
        copy = f"COPY ({sql}) TO {quoted(path)} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {rows})"
        self._run(lambda: self.connection.execute(copy), doing)

    def _run(self, work: Callable[[], Result], doing: str) -> Result:
        """Return the result of `work`, run in another thread. This one shows progress and handles Ctrl-C."""
        with progress_bar(doing, 100, "%") as bar:
            future = self._worker.submit(work)
            try:
                while True:
                    try:
                        result = future.result(timeout=POLL_SECONDS)
                        bar.update(100 - bar.n)
                        return result
                    except TimeoutError:
                        bar.update(max(0, self.connection.query_progress() - bar.n))
            except KeyboardInterrupt:
                self.connection.interrupt()
                raise
            except duckdb.OutOfMemoryException as error:
                raise AttributionError(
                    f"--memory_limit {self._memory_limit} is too low for {doing}: give more "
                    f"({first_line(error)})"
                ) from error
            except (duckdb.IOException, duckdb.InvalidInputException) as error:
                # a full disk; a file that is damaged or was removed
                raise AttributionError(f"{doing}: {first_line(error)}") from error

    def _create_tables(self) -> None:
        rows = " UNION ALL BY NAME ".join(self._rows_of(number) for number in range(len(self.runs)))
        self.connection.execute(f"CREATE VIEW all_rows AS {rows}")
        self.create("steps", _steps_sql(self._normalise), "reading steps")
        domains = "SELECT DISTINCT domain::VARCHAR FROM all_rows ORDER BY ALL"
        self._run(
            lambda: self.connection.execute(f"CREATE TYPE domains AS ENUM ({domains})"), "reading domains"
        )
        weight = "1.0" if self._normalise == "none" else "s.weight"
        parts = "" if self.by_word is None else f", (r.part_factor * {weight})::DOUBLE AS part_factor"
        columns = f"r.* EXCLUDE (in_window, expected_value) REPLACE (r.domain::domains AS domain{parts})"
        source = "all_rows r"
        if self._normalise != "none":  # else every weight is 1, so the join is not needed
            source += " JOIN steps s USING (run, step)"
        columns += f", r.value * {weight} AS weighted_value"
        self.connection.execute(f"CREATE VIEW scores AS SELECT {columns} FROM {source} WHERE in_window")

    def _rows_of(self, number: int) -> str:
        """Return SQL for a run's rows in the window and in the next step, whose val_loss `measured` needs."""
        run, (first, last) = self.runs[number], self.windows[number]
        filled = dict.fromkeys(run.lacks, "NULL::DOUBLE") | (
            {"row_weight": EQUAL_WEIGHT} if "row_weight" in run.lacks else {}
        )
        added = "".join(f", {sql} AS {name}" for name, sql in filled.items())
        want = "exact_value" if run.exact else IN_PASS
        parts = ""
        if self.by_word is not None:
            name, factor = PARTS[self.by_word]
            parts = f", {name} AS parts, {factor} AS part_factor"
        return f"""
            SELECT {number}::INTEGER AS run, step <= {last} AS in_window, {want} AS expected_value{parts}, *
            FROM (SELECT *{added} FROM {parquet(*run.files)} WHERE step BETWEEN {first} AND {last + 1})
        """


def _steps_sql(normalise: Normalise) -> str:
    """Return SQL for the table `steps`."""
    return f"""
        WITH sums AS (
            SELECT
                run, step, any_value(in_window) AS in_window,
                any_value(lr) AS lr, any_value(clip_factor) AS clip_factor,
                favg(train_loss) AS train_loss, any_value(val_loss) AS val_loss,
                fsum(value) AS predicted, fsum(abs(value)) AS absolute,
                count(*) AS rows, any_value(global_batch_size) AS expected,
                count_if(abs(value - expected_value) > 1e-9 * abs(value)) AS damaged
            FROM all_rows GROUP BY run, step
        ), following AS (
            SELECT *, val_loss - lead(val_loss) OVER (PARTITION BY run ORDER BY step) AS measured FROM sums
        )
        SELECT * EXCLUDE (in_window), {WEIGHTS[normalise]} AS weight
        FROM following WHERE in_window ORDER BY run, step
    """


def parquet(*paths: Path) -> str:
    """Return SQL for the rows of these files. Paths are escaped: DuckDB expands patterns, and reads a folder
    named a=b as a column."""
    files = ", ".join(quoted(escape(str(path))) for path in paths)
    return f"read_parquet([{files}], hive_partitioning = false)"


def quoted(text: object) -> str:
    """Return the text as an SQL string."""
    return "'" + str(text).replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    """Return an error's message without DuckDB's hints on SQL, which follow on later lines."""
    return str(error).splitlines()[0]
