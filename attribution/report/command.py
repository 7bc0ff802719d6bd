"""Write a report on one or several runs: one HTML file that needs no server and no manual.

    python -m attribution.report RESULT_DIR [RESULT_DIR ...] [--normalise none|absolute|predicted]
        [--steps FIRST:LAST] [--output FILE.html] [--pile_data_dir D] [--memory_limit 4GB]

The same runs and options give the same file except for its date. The page has no scripts; its content policy
forbids scripts and network access.
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
from attribution.errors import AttributionError
from attribution.options import make_argument_parser, read_options
from attribution.report import texts
from attribution.report.audit_section import build_audit_section
from attribution.report.charts import sketch_distribution, sketch_losses
from attribution.report.domain_charts import (
    FEW_SAMPLES,
    sketch_domain_course,
    sketch_domain_means,
    sketch_domain_shares,
)
from attribution.report.excerpts import collect_documents, collect_samples, collect_validation_rows
from attribution.report.page import render_page
from attribution.report.plots import Plot, Sketch, choose_scale
from attribution.report.tables import (
    average_domains,
    collect_loss_curves,
    count_by_value,
    count_samples,
    sum_domains_by_step,
)
from attribution.scored_run import ScoredRun, samples_of
from attribution.screen import plain_console
from attribution.values import write_values
from attribution.values_folder import Values
from attribution.words import DIVIDED
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
    """Write the report. It replaces an older file, and is never there in part.

    The values for it are computed in a hidden folder beside it, which is removed.

    Args:
        normalise, steps, memory_limit, pile_data_dir: as of `write_values`.
        date: shown on the page; None: now.

    Raises:
        AttributionError: as `write_values`; no step of the runs has values; the output's folder does not
            exist, or the output exists and is no plain file.
        ShardError: as `ScoredRun.shards`.
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
            content = collect_content(database, values, normalise, pile_data_dir)
        shown_date = f"{date or datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        html = render_page({**content, "plots": draw_plots(content), "date": shown_date})
        write_text(output, html, Path(folder) / "report.html")


def collect_content(
    database: ScoreDatabase, values: Values, normalise: Normalise, pile_data_dir: Path | None
) -> dict[str, Any]:
    """Return the variables of the page's template, except the date, with plots as sketches.

    Args:
        values: of the database's runs, with the same options.
    """
    runs = database.runs
    steps = values.read("steps")
    if steps["predicted"].null_count == len(steps):
        raise AttributionError(
            f"no step of {', '.join(str(run.folder) for run in runs)} has values: the optimizer made no "
            "update in any of them, as when float16 gradients overflow; there is nothing to report"
        )
    value_unit = texts.VALUE_UNITS[normalise]
    samples = samples_of(runs, pile_data_dir)
    return {
        **texts.describe_runs(runs, database.windows, steps, normalise),
        "totals": count_samples(database, values),
        **build_loss_section(runs, steps),
        **build_domain_section(database, values, value_unit),
        "distribution": sketch_distribution(count_by_value(database, values), value_unit),
        **collect_samples(database, values, value_unit, samples),
        **collect_documents(database, values, value_unit, samples),
        **build_audit_section(database, values.read("audit")),
        "validation": collect_validation_rows(runs),
        "has_documents": samples.documents is not None,
        "documents_divided": DIVIDED[values.by_word],
        "samples_described": samples.described,
        "noun": samples.noun,
        "settings": texts.list_settings([run.config for run in runs]),
    }


def check_settings(run: ScoredRun) -> None:
    """Raise AttributionError if config.json lacks a setting that the report shows."""
    missing = [name for name in NEEDED_SETTINGS if name not in run.config]
    if missing:
        raise AttributionError(
            f"{run.folder / 'config.json'} has no {', '.join(missing)}: another version of this program "
            "trained the run; make its report with that version, or train it again"
        )


def draw_plots(content: dict[str, Any]) -> dict[str, Plot]:
    """Draw all sketches of the content, with a progress bar."""
    sketches = {name: part for name, part in content.items() if isinstance(part, Sketch)}
    plots = {}
    with progress_bar("drawing", len(sketches), "plots") as bar:
        for name, sketch in sketches.items():
            plots[name] = sketch.plot()
            bar.update()
    return plots


def build_loss_section(runs: Sequence[ScoredRun], steps: pa.Table) -> dict[str, Any]:
    curves, per_point = collect_loss_curves(steps, [run.metrics() for run in runs])
    return {
        "losses": sketch_losses(curves),
        "losses_caption": texts.caption_losses(curves, per_point, len(runs)),
    }


def build_domain_section(database: ScoreDatabase, values: Values, value_unit: str) -> dict[str, Any]:
    rows = values.read("domains").to_pylist()
    means = average_domains(database, values)
    certain = [mean for mean in means if mean.samples >= FEW_SAMPLES]
    bins = sum_domains_by_step(database)
    return {
        "domains": rows,
        "mean_scale": choose_scale(max(abs(row["mean_value"] or 0) for row in rows), value_unit),
        "sum_scale": choose_scale(max(abs(row["value"] or 0) for row in rows), value_unit),
        "best_domain": max(certain, key=lambda mean: mean.mean).domain if certain else None,
        "domain_means": sketch_domain_means(means, value_unit),
        "domain_shares": sketch_domain_shares(bins),
        "domain_course": sketch_domain_course(bins),
        "bin_steps": int(bins.edges[1] - bins.edges[0]),
    }


def main(argv: list[str]) -> None:
    parser = make_argument_parser("attribution.report", "A report on a run's values, as one HTML file.")
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE", help="[RESULT_DIR/report.html, of the first run]"
    )
    arguments = parser.parse_args(argv)
    options = read_options(arguments)
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
