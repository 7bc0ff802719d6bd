"""The table at the end of a run: how it went, and which samples helped and hurt the validation loss most so
far."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from config_file import TrainingConfig
from ghostEngines.metrics_log import summed_values
from training_data import TrainingData
from training_state import Progress

EXTREMES = 3  # samples shown at either end
FIRST_TOKENS = 200  # decoded for the first words
FIRST_CHARACTERS = 100


def print_summary(config: TrainingConfig, progress: Progress, data: TrainingData) -> None:
    """Prints the table of a run that has made at least one step, to standard output."""
    console = Console(highlight=False, markup=False, emoji=False)
    lines = {
        "steps": f"{progress.steps} of {config.max_steps}",
        "tokens/s": f"{progress.tokens / progress.seconds:,.0f}",
        "train loss, last step": f"{progress.train_loss.item():.4f}",
        **evaluation_lines(progress, data),
        "results": config.result_dir,
    }
    if config.method == "GradDotProd":
        lines["dot products"] = config.result_dir / "grad_dotprods"
    console.print(f"\n{config.run_name}", soft_wrap=True)
    for name, value in lines.items():
        console.print(f"{name:22s} {value}", soft_wrap=True)  # a path stays in one piece
    if config.method == "GradDotProd":
        print_extremes(console, config, data)


def evaluation_lines(progress: Progress, data: TrainingData) -> dict[str, str]:
    """The losses of the last evaluation, if there was one."""
    if progress.evaluation is None:
        return dict.fromkeys([f"loss on {name}" for name in data.evaluation], "not evaluated yet")
    return {f"loss on {name}": f"{loss:.4f}" for name, loss in progress.evaluation.items()}


def print_extremes(console: Console, config: TrainingConfig, data: TrainingData) -> None:
    """The samples with the highest and the lowest summed value, with their first words, a line each."""
    sums = summed_values(config.result_dir / "grad_dotprods")
    values = sums.filter(sums["value"].is_valid())  # null: all of the sample's steps were skipped
    count = min(EXTREMES, len(values))
    for title, rows in (("highest", values[:count]), ("lowest", values[len(values) - count :])):
        table = Table.grid(padding=(0, 2))
        for row in rows.to_pylist():
            tokens = data.blocks["train"].tokens(row["domain"], row["block"])
            words = Text(first_words(data.tokenizer.decode(tokens[:FIRST_TOKENS].tolist())), no_wrap=True)
            words.overflow = "ellipsis"
            table.add_row(f"{row['value']:+.3e}", f"{row['domain']}, block {row['block']}", words)
        console.print(f"{title} summed value so far: predicted fall of the validation loss, in nats")
        console.print(table)


def first_words(text: str) -> str:
    """The beginning of a text in a line, without what could steer a terminal."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:FIRST_CHARACTERS]
