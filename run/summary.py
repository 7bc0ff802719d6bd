"""The table at the end of a run: how it went, and which samples helped and hurt the validation loss most so
far."""

from typing import TYPE_CHECKING

from rich.console import Console

from attribution.audit import audit_lines, measure_audit
from attribution.database import ScoreDatabase
from attribution.scored_run import ScoredRun
from attribution.screen import plain_console, print_samples
from attribution.values import sample_sums, samples_sql
from attribution.values_folder import highest_and_lowest
from run.log import records_before
from run.state import Progress

if TYPE_CHECKING:
    from config_file import TrainingConfig
    from dataloader import TrainingData

EXTREMES = 3  # samples shown at either end


def print_summary(config: "TrainingConfig", progress: Progress, data: "TrainingData") -> None:
    """Print the table of a run that has made at least one step, to standard output."""
    console = plain_console()
    idle = progress.steps == progress.resumed_at  # what is shown is of the process before
    nothing_left = idle and progress.steps == config.max_steps
    lines = {
        "steps": f"{progress.steps} of {config.max_steps}"
        + (", none was left to make" if nothing_left else ""),
        "tokens/s": f"{progress.tokens / progress.seconds:,.0f}",
        **(recorded_loss(config, progress) if idle else last_loss(progress)),
        **evaluation_lines(progress, data),
        "results": config.result_dir,
    }
    if config.computes_scores:
        lines["dot products"] = config.folder.scores
    console.print(f"\n{config.run_name}", soft_wrap=True)
    for name, value in lines.items():
        console.print(f"{name:22s} {value}", soft_wrap=True)  # a path stays in one piece
    if config.computes_scores:
        print_scores(console, config)


def last_loss(progress: Progress) -> dict[str, str]:
    """Return the training loss of the last step, which this process made."""
    return {"train loss, last step": f"{progress.train_loss.item():.4f}"}


def recorded_loss(config: "TrainingConfig", progress: Progress) -> dict[str, str]:
    """Return the last training loss in metrics.jsonl, where this process made no step."""
    lines = records_before(config.folder.metrics, progress.steps)
    losses = [(record["step"], record["train_loss"]) for _, record in lines if "train_loss" in record]
    if not losses:
        return {"train loss, last step": f"not recorded (--log_interval {config.log_interval})"}
    step, loss = losses[-1]
    return {f"train loss, step {step}": f"{loss:.4f}"}


def evaluation_lines(progress: Progress, data: "TrainingData") -> dict[str, str]:
    """Return the losses of the last evaluation, if there was one."""
    if progress.evaluation is None:
        return dict.fromkeys([f"loss on {name}" for name in data.evaluation], "not evaluated yet")
    return {f"loss on {name}": f"{loss:.4f}" for name, loss in progress.evaluation.items()}


def print_scores(console: Console, config: "TrainingConfig") -> None:
    """Print the samples with the highest and the lowest summed value, with their first words, and the audit."""
    run = ScoredRun.open(config.result_dir)
    with ScoreDatabase([run]) as database:
        database.create("sums", samples_sql(sample_sums(database)), "summing samples")
        highest, lowest = highest_and_lowest(database.connection, "sums", "sample_id", EXTREMES)
        audit = measure_audit(database)
    of_what = "summed value so far: fall of the validation loss, in nats"
    lowest = lowest.sort_by([("value", "descending")])
    titles = {f"highest {of_what}": highest, f"lowest {of_what}": lowest}
    print_samples(console, titles, run.samples())
    console.print("audit of in-pass values against exact ones, by phase of training")
    for line in audit_lines([run], audit):
        console.print(line, soft_wrap=True)
