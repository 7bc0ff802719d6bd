"""Word the report's sentences from the runs' settings and numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from attribution.database import Normalise
from attribution.report.charts import Curve
from attribution.scored_run import ScoredRun
from attribution.words import DESCRIBED, why_none
from score_store.schema import WordSplit

VALUE_UNITS: dict[Normalise, str] = {"none": "nats", "absolute": "step totals", "predicted": "step changes"}
VALUE_UNIT_SENTENCES: dict[Normalise, str] = {
    "none": "Values are in nats, the unit of the loss itself: a value of 0.001 nats predicts that the loss "
    "falls by 0.001 because of this sample. Small ones are written in thousandths of a nat (10⁻³ nats) or in "
    "millionths (10⁻⁶ nats).",
    "absolute": "Values are normalised: those of each step are divided by the sum of their absolute values, "
    "so that late steps, in which the loss changes little, count as much as early ones. Their unit is the "
    "step total: 0.01 is one hundredth of a step’s sum of absolute values.",
    "predicted": "Values are normalised: those of each step are divided by the size of the change of the "
    "loss that they predict together, so that late steps, in which the loss changes little, count as much as "
    "early ones. Their unit is the step change: 0.01 is one hundredth of what a step’s values predict "
    "together.",
}
WORD_SENTENCES: dict[WordSplit, str] = {
    "target": "A word is a token of the model, and its value is what learning to predict it here, from the words "
    "before it, did for the validation rows. The first word is the target of nothing.",
    "position": "A word is a token of the model, and its value is what the weights’ uses at its place, which serve "
    "the predictions of all words after it, did for the validation rows. It is not what the word as a target did.",
}
ABSENT = "(this run has no such setting)"


def describe_runs(
    runs: Sequence[ScoredRun], windows: Sequence[tuple[int, int]], steps: pa.Table, normalise: Normalise
) -> dict[str, Any]:
    """Return the template variables of the first paragraphs. windows: first and last step of each run."""
    kinds = {(run.config["direction"], run.config["optimizer"]) for run in runs}
    reason = "the optimizer made no update there, as when float16 gradients overflow"
    if any(direction != "gradient" and optimizer == "AdamW" for direction, optimizer in kinds):
        reason += "; in AdamW’s first step its scaling of the gradient is not known yet"
    return {
        "runs": [{"name": run.folder.resolve().name, "folder": str(run.folder)} for run in runs],
        "title": ", ".join(run.folder.resolve().name for run in runs),
        "rows_shown": _rows_shown(runs),
        "unit_sentence": VALUE_UNIT_SENTENCES[normalise],
        "steps_shown": _steps_shown(windows),
        "validation_loss": _validation_loss(steps),
        "skipped": steps["predicted"].null_count,
        "skipped_reason": reason,
    }


def describe_words(by_word: WordSplit | None, runs: Sequence[ScoredRun], coloured: bool) -> str:
    """Return what the colours of the samples' texts say, or why there are none."""
    if by_word is None:
        return f"The texts have no colours: there is no split by word ({why_none(runs)})."
    if not coloured:
        return (
            f"Values are split {DESCRIBED[by_word]}; the texts have no colours, because the run keeps no text of each "
            "token: a loop of one’s own can put them into its samples’ metadata as “pieces”."
        )
    return (
        f"Texts are coloured {DESCRIBED[by_word]}. {WORD_SENTENCES[by_word]} Blue: helped; orange: hurt; strong ones "
        "are underlined, dotted if they hurt. Rest the pointer on a word for its value; they add up to the sample’s."
    )


def _rows_shown(runs: Sequence[ScoredRun]) -> str:
    kinds = {(run.metadata["validation_sha256"], run.config["val_set"]) for run in runs}
    if len(kinds) > 1:
        return "validation texts of each run’s own"
    count = runs[0].config["val_batch_size"]
    return f"{count} {'text' if count == 1 else 'texts'} of the validation data ({runs[0].config['val_set']})"


def _steps_shown(windows: Sequence[tuple[int, int]]) -> str:
    shown = {f"{last + 1:,}" if first == 0 else f"{first:,} to {last:,}" for first, last in windows}
    return " / ".join(sorted(shown))


def _validation_loss(steps: pa.Table) -> str:
    """Return the loss before the first step and before the last, each the mean over the runs."""
    run, loss = steps["run"].to_numpy(), steps["val_loss"].to_numpy(zero_copy_only=False)
    of_runs = [loss[run == number] for number in np.unique(run)]
    first, last = (np.mean([losses[place] for losses in of_runs]) for place in (0, -1))
    if not np.isfinite(loss).any():
        return "not known"
    return f"{first:.3f}" if max(map(len, of_runs)) == 1 else f"{first:.3f} → {last:.3f}"


def caption_losses(curves: Sequence[Curve], per_point: int, runs: int) -> str:
    """Return the caption of the chart of losses."""
    caption = "Mean loss of each training batch, and of the validation rows before each step."
    if per_point > 1:
        caption += f" A point is the mean of {per_point:,} steps."
    if any(curve.evaluated for curve in curves):
        caption += " Evaluations run in some steps only, on other batches of each split."
    return caption + (f" One line for each of the {runs} runs." if runs > 1 else "")


def list_settings(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return each setting's name and values: one value if all runs have the same, else one per run."""
    names = dict.fromkeys(name for config in configs for name in config)
    rows = []
    for name in names:
        entries = [_setting(config[name]) if name in config else ABSENT for config in configs]
        rows.append((name, entries[:1] if len(set(entries)) == 1 else entries))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_setting(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.10g}"
    return ", ".join(map(_setting, value)) if isinstance(value, list) else str(value)
