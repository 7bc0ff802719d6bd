"""The table at the end of a run: how it went, and which samples helped and hurt the validation loss most so
far."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from config_file import TrainingConfig
from ghostEngines.metrics_log import summed_values
from training_data import TrainingData
from training_loop import Progress

EXTREMES = 3  # samples shown at either end
FIRST_TOKENS = 200  # decoded for the first words
FIRST_CHARACTERS = 60


def print_summary(config: TrainingConfig, progress: Progress, data: TrainingData) -> None:
    """Prints the table of a run that has made at least one step, to standard output."""
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, title=config.run_name, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("steps", f"{progress.steps} of {config.max_steps}")
    table.add_row("tokens/s", f"{progress.tokens / progress.seconds:,.0f}")
    table.add_row("train loss, last step", f"{progress.train_loss:.4f}")
    if progress.evaluation is not None:
        for name, loss in progress.evaluation.items():
            table.add_row(f"loss on {name}", f"{loss:.4f}")
    table.add_row("results", str(config.result_dir))
    if config.method == "GradDotProd":
        table.add_row("dot products", str(config.result_dir / "grad_dotprods"))
        add_extremes(table, config, data)
    console.print(table)


def add_extremes(table: Table, config: TrainingConfig, data: TrainingData) -> None:
    """The samples with the highest and the lowest summed value: the predicted fall of the validation loss, in
    nats."""
    sums = summed_values(config.result_dir / "grad_dotprods")
    values = sums.filter(sums["value"].is_valid())  # null: all of the sample's steps were skipped
    count = min(EXTREMES, len(values))
    for title, rows in (("highest value", values[:count]), ("lowest value", values[len(values) - count :])):
        for row in rows.to_pylist():
            tokens = data.blocks["train"].tokens(row["domain"], row["block"])
            words = " ".join(data.tokenizer.decode(tokens[:FIRST_TOKENS].tolist()).split())
            sample = f"{row['domain']} block {row['block']}: {words[:FIRST_CHARACTERS]}"
            table.add_row(title, f"{row['value']:+.3e}  {escape(sample)}")
