"""One HTML file about a run, or several, that a person understands without a manual and opens from the disk.

    python -m attribution.report RESULT_DIR [RESULT_DIR ...] [--normalise none|absolute|predicted]
        [--steps FIRST:LAST] [--output FILE.html] [--pile_data_dir D] [--memory_limit 4GB]

The same runs and options give the same file but for its date. It has no scripts, and a policy that forbids
them and the network.
"""

import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from attribution.completeness import Window
from attribution.database import MEMORY_LIMIT, Normalise, ScoreDatabase
from attribution.options import argument_parser, run_options
from attribution.report import texts
from attribution.report.charts import distribution, losses
from attribution.report.domain_charts import FEW_SAMPLES, domain_course, domain_means, domain_shares
from attribution.report.efficiency_section import efficiency_section
from attribution.report.excerpts import documents, samples, validation_rows
from attribution.report.page import page
from attribution.report.plots import Plot, Sketch, unit_for
from attribution.report.tables import domain_bins, domain_spread, histogram, loss_curves, totals
from attribution.scored_run import AttributionError, ScoredRun
from attribution.screen import plain_console
from attribution.values import write_values
from attribution.values_folder import Values
from data_processing.tokenizers import get_tokenizer
from foundation.errors import file_errors
from foundation.files import write_text
from foundation.paths import path_argument
from foundation.progress import progress_bar

NEEDED_SETTINGS = ("optimizer", "direction", "val_set", "val_batch_size")


def write_report(
    runs: Sequence[ScoredRun],
    output: Path,
    *,
    normalise: Normalise = "none",
    steps: Window = (None, None),
    memory_limit: str = MEMORY_LIMIT,
    pile_data_dir: Path | None = None,
    date: datetime | None = None,
) -> None:
    """Writes the file, which appears whole and takes the place of an older one. Its values are made in a
    hidden folder beside it, which is removed.

    date: that it names; None: now. The other options are those of `write_values`.

    Raises:
        AttributionError: what `write_values` raises; no step of the runs has values; the output's folder is
        not there, or the output is there and no plain file.
        ShardError: what `ScoredRun.shards` raises.
    """
    if not output.parent.is_dir() or (os.path.lexists(output) and not output.is_file()):
        raise AttributionError(f"--output {output}: name a plain file, in a folder that is there")
    for run in runs:
        check_settings(run)
    options: dict[str, Any] = {"normalise": normalise, "steps": steps, "memory_limit": memory_limit}
    with (
        file_errors(f"--output {output}", AttributionError),
        tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as folder,
    ):
        values = write_values(runs, Path(folder) / "values", pile_data_dir=pile_data_dir, **options)
        with ScoreDatabase(runs, spill_folder=Path(folder), **options) as database:
            content = report_content(database, values, normalise, pile_data_dir)
        shown_date = f"{date or datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        html = page({**content, "plots": drawn(content), "date": shown_date})
        write_text(output, html, Path(folder) / "report.html")


def report_content(
    database: ScoreDatabase, values: Values, normalise: Normalise, pile_data_dir: Path | None
) -> dict[str, Any]:
    """All that the page shows but the date, with plots as sketches. values: of the database's runs, with the
    same options."""
    runs = database.runs
    steps = values.read("steps")
    if steps["predicted"].null_count == len(steps):
        raise AttributionError(
            f"no step of {', '.join(str(run.folder) for run in runs)} has values: the optimizer made no "
            "update in any of them, as with float16 gradients that overflow; there is nothing to report"
        )
    unit_name = texts.UNITS[normalise]
    blocks, shards = runs[0].blocks(pile_data_dir), runs[0].shards(pile_data_dir)
    tokenizer = get_tokenizer(blocks.tokenizer)
    return {
        **texts.introduction(runs, database.windows, steps, normalise),
        "totals": totals(database, values),
        **loss_section(runs, steps),
        **domain_section(database, values, unit_name),
        "distribution": distribution(histogram(database, values), unit_name),
        **samples(database, values, unit_name, blocks, tokenizer),
        **documents(database, values, unit_name, shards, tokenizer),
        **efficiency_section(runs, steps, normalise),
        "validation": validation_rows(runs, tokenizer),
        "settings": texts.settings([run.config for run in runs]),
    }


def check_settings(run: ScoredRun) -> None:
    """AttributionError if config.json lacks a setting that the report speaks of."""
    missing = [name for name in NEEDED_SETTINGS if name not in run.config]
    if missing:
        raise AttributionError(
            f"{run.folder / 'config.json'} has no {', '.join(missing)}: another version of this program "
            "trained the run; make its report with that version, or train it again"
        )


def drawn(content: dict[str, Any]) -> dict[str, Plot]:
    """The plots of all sketches."""
    sketches = {name: part for name, part in content.items() if isinstance(part, Sketch)}
    plots = {}
    with progress_bar("drawing", len(sketches), "plots") as bar:
        for name, sketch in sketches.items():
            plots[name] = sketch.plot()
            bar.update()
    return plots


def loss_section(runs: Sequence[ScoredRun], steps: pa.Table) -> dict[str, Any]:
    curves, per_point = loss_curves(steps, [run.metrics() for run in runs])
    return {"losses": losses(curves), "losses_caption": texts.losses_caption(curves, per_point, len(runs))}


def domain_section(database: ScoreDatabase, values: Values, unit_name: str) -> dict[str, Any]:
    rows = values.read("domains").to_pylist()
    means = domain_spread(database, values)
    certain = [mean for mean in means if mean.samples >= FEW_SAMPLES]
    bins = domain_bins(database)
    return {
        "domains": rows,
        "mean_unit": unit_for(max(abs(row["mean_value"] or 0) for row in rows), unit_name),
        "sum_unit": unit_for(max(abs(row["value"] or 0) for row in rows), unit_name),
        "best_domain": max(certain, key=lambda mean: mean.mean).domain if certain else None,
        "domain_means": domain_means(means, unit_name),
        "domain_shares": domain_shares(bins),
        "domain_course": domain_course(bins),
        "bin_steps": int(bins.edges[1] - bins.edges[0]),
    }


def main(argv: list[str]) -> None:
    parser = argument_parser("attribution.report", "A report on a run's values, as one HTML file.")
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE", help="[RESULT_DIR/report.html, of the first run]"
    )
    arguments = parser.parse_args(argv)
    options = run_options(arguments)
    output = arguments.output or options.runs[0].folder / "report.html"
    write_report(
        options.runs,
        output,
        normalise=options.normalise,
        steps=options.steps,
        memory_limit=options.memory_limit,
        pile_data_dir=options.pile_data_dir,
    )
    plain_console().print(str(output), soft_wrap=True)
