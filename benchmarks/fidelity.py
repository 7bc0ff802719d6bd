"""Compare predicted and measured falls of the validation loss under SGD and AdamW, with both directions.

    PILE_SAMPLE_DIR=... python -m benchmarks.fidelity --work_dir /tmp/fidelity

Train GPT2-Tiny on the sample data with SGD, with AdamW, and with AdamW and --direction adamw, several seeds
each. Compare the predicted fall of the validation rows' loss, Σ values, with the measured one: print the
correlation and measured / predicted over windows of steps. For --direction adamw also print the share of
Σ values that comes from parameter entries with sqrt(v̂) < 1e-6. Those belong to tokens that have not occurred
for many steps; the preconditioner P is large there.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attribution.database import ScoreDatabase
from attribution.efficiency import WINDOWS, select_falls, sum_windows
from attribution.scored_run import ScoredRun
from benchmarks.experiment import experiment_parser, make_sample_shards, run_side_by_side, train

RARE = 1e-6
SPANS = {"all steps": 0, "from step 50 on": 50}  # in the first steps the loss falls fast
FIRST_NOTES, NOTE_EVERY = (1, 2, 5, 10, 20), 50
RUNS: dict[str, dict[str, object]] = {
    "SGD, small steps": {"optimizer": "SGD", "learning_rate": 0.003, "weight_decay": 0.0},
    "SGD, gradient": {"optimizer": "SGD", "learning_rate": 0.3, "weight_decay": 0.0},
    "AdamW, gradient": {"learning_rate": 1e-3},
    "AdamW, adamw": {"learning_rate": 1e-3, "direction": "adamw"},
}


def run_watched(notes: str, flags: list[str]) -> None:
    """Run main.py in this process. Before some steps write the rare entries' part in Σ values to a file."""
    import main
    import training_loop

    Path(notes).unlink(missing_ok=True)
    step = training_loop.Trainer._step

    def noting(self: Any, number: int) -> None:
        if number in FIRST_NOTES or (number > 0 and number % NOTE_EVERY == 0):
            with open(notes, "a") as file:
                file.write(json.dumps({"step": number, **measure_rare_part(self, number)}) + "\n")
        step(self, number)

    with patch.object(training_loop.Trainer, "_step", noting):
        sys.exit(main.main(flags))


def measure_rare_part(trainer: Any, step: int) -> dict[str, float]:
    """Return parts of <∇ of the step's train rows, P∘∇L_val>.

    Returns:
        total; rare: the part from entries with sqrt(v̂) < RARE; entries: their share of all entries.
    """
    parameters = list(trainer.model.parameters())

    def gradient(batch: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(trainer.model(batch.x, batch.y).mean(), parameters)

    with trainer.manager.detached():
        batch = trainer.data.train.batch(step)
        gradients = zip(parameters, gradient(batch), gradient(trainer.data.validation), strict=True)
        total = rare = entries = 0.0
        group = trainer.optimizer.param_groups[0]
        for parameter, train_gradient, val_gradient in gradients:
            state = trainer.optimizer.state[parameter]
            root = (state["exp_avg_sq"].double() / (1 - group["betas"][1] ** state["step"].double())).sqrt()
            parts = train_gradient.double() * val_gradient.double() / (root + group["eps"])
            total += parts.sum().item()
            rare += parts[root < RARE].sum().item()
            entries += (root < RARE).sum().item()
    return {"total": total, "rare": rare, "entries": entries / sum(p.numel() for p in parameters)}


def run_one(work_dir: Path, name: str, seed: int, max_steps: int) -> ScoredRun:
    notes = work_dir / f"{name}-{seed}.jsonl"
    command = ("-m", "benchmarks.fidelity", "--watched", notes) if "adamw" in name else ("main.py",)
    folder = train(
        work_dir, f"{name}-{seed}", command=command, pile_data_dir=work_dir / "shards", block_size=64,
        batch_size=8, val_batch_size=4, max_steps=max_steps, eval_interval=max_steps, seed=seed, **RUNS[name],
    )  # fmt: skip
    return ScoredRun.open(folder)


def format_correlation(predicted: np.ndarray, measured: np.ndarray) -> str:
    """Return Pearson's correlation as text; a dash for fewer than three numbers."""
    return f"{np.corrcoef(predicted, measured)[0, 1]:+.3f}" if len(predicted) >= 3 else "-"


def main(argv: list[str]) -> None:
    if argv[:1] == ["--watched"]:
        run_watched(argv[1], argv[2:])
    args = experiment_parser("benchmarks.fidelity", __doc__.split("\n")[0]).parse_args(argv)
    make_sample_shards(args.work_dir / "shards")
    places = [(name, seed) for seed in range(args.seeds) for name in RUNS]
    runs = run_side_by_side(
        args.jobs, [partial(run_one, args.work_dir, *each, args.max_steps) for each in places]
    )
    columns = [f"{what}, {span}" for what in ("each step", "windows of 50") for span in SPANS]
    table = Table("run", "seed", *columns, "measured / predicted")
    pooled: dict[str, list[np.ndarray]] = {name: [] for name in RUNS}
    for (name, seed), run in sorted(zip(places, runs, strict=True), key=lambda each: each[0]):
        with ScoreDatabase([run]) as database:
            steps = database.query("SELECT * FROM steps ORDER BY step", "reading steps")
        ((_, predicted, measured),) = select_falls(steps)
        correlations = [
            format_correlation(
                sum_windows(predicted, window)[first // window :],
                sum_windows(measured, window)[first // window :],
            )
            for window in WINDOWS
            for first in SPANS.values()
        ]
        table.add_row(name, str(seed), *correlations, f"{measured.sum() / predicted.sum():.3g}")
        pooled[name].append(np.stack([sum_windows(each, WINDOWS[-1]) for each in (predicted, measured)]))
    console = Console(width=130, highlight=False)
    console.print(table)
    for name, windows in pooled.items():
        for span, first in SPANS.items():
            predicted, measured = np.concatenate(
                [each[:, first // WINDOWS[-1] :] for each in windows], axis=1
            )
            console.print(
                f"{name}, {span}: correlation over all {len(predicted)} windows of {WINDOWS[-1]} steps "
                f"{format_correlation(predicted, measured)}"
            )
    for notes in sorted(args.work_dir.glob("*.jsonl")):
        for line in notes.read_text().splitlines():
            note = json.loads(line)
            console.print(
                f"{notes.stem}, step {note['step']}: sqrt(v̂) < {RARE:g} in {note['entries']:.1%} of the "
                f"entries, {note['rare'] / note['total']:+.1%} of Σ values"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
