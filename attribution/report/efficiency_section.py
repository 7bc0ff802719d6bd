"""Build the report's check of predicted against measured falls of the loss, in sentences and charts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attribution.database import Normalise
from attribution.efficiency import WINDOWS, Efficiency, measure_efficiency, select_falls, sum_windows
from attribution.report.charts import Falls, sketch_fall_course, sketch_falls
from attribution.scored_run import ScoredRun

STRENGTHS = {0.8: "strong", 0.5: "moderate", 0.2: "weak"}  # lowest absolute correlation -> word
# (optimizer, direction) -> how to read the values
ADVICE = {
    ("SGD", "gradient"): (
        "Values assume a small step along the gradient. SGD steps along the gradient, but its steps are not "
        "always small, and weight decay adds to them."
    ),
    ("AdamW", "gradient"): (
        "Values assume a small step along the gradient. AdamW scales each entry of the gradient, and its steps "
        "are often far longer: read the values as a ranking of the samples, not as amounts of loss. (A run "
        "with “direction” set to “adamw” takes this scaling into account.)"
    ),
    ("AdamW", "adamw"): (
        "The values follow AdamW’s scaling of the gradient’s entries (“direction” is “adamw”), but not its "
        "momentum and weight decay. The scaling is extreme in the first steps, and for tokens that have not "
        "been seen for many steps: leave the first steps out (--steps), or let each step count the same "
        "(--normalise absolute)."
    ),
}
NOTHING_TO_COMPARE = (
    "No step has a prediction and a loss both before and after it: there is nothing to compare."
)
SCATTER_CAPTION = (
    "A point is the fall of the validation loss in a step, or in a window of steps. The closer the points "
    "are to one rising line, the better the values predict which steps lower the loss more."
)
COURSE_CAPTION = (
    "Both falls, added up over the steps. The prediction is stretched to the same height, so that the shapes "
    "can be compared."
)


def build_efficiency_section(
    runs: Sequence[ScoredRun], steps: pa.Table, normalise: Normalise
) -> dict[str, Any]:
    """Return the template variables of the section. steps: as in a folder of values."""
    finite = pc.and_(pc.is_finite(steps["predicted"]), pc.is_finite(steps["measured"]))
    both = steps.filter(finite)  # this drops nulls, too
    found = measure_efficiency(both)
    names = [run.folder.resolve().name for run in runs]
    shown = [
        {
            "name": name,
            "folder": str(run.folder),
            "check": describe_efficiency(
                [each for each in found if each.run == number], *_totals(both, number)
            ),
        }
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    kinds = sorted({(run.config["optimizer"], run.config["direction"]) for run in runs})
    raw = "" if normalise == "none" else " Here the values are not normalised."
    advice = "A correlation and a ratio near 1 mean that values can be read as amounts of loss. "
    return {
        "runs": shown,
        "raw_note": raw,
        "check_advice": advice + " ".join(ADVICE[kind] for kind in kinds),
        **_charts(both, names),
    }


def _totals(both: pa.Table, run: int) -> tuple[float, float]:
    rows = both.filter(pc.equal(both["run"], run))
    return float(rows["predicted"].to_numpy().sum()), float(rows["measured"].to_numpy().sum())


def describe_efficiency(found: Sequence[Efficiency], predicted: float, measured: float) -> list[str]:
    """Return sentences on one run.

    Args:
        found: of the run, one for each of WINDOWS; empty if there is nothing to compare.
        predicted, measured: the run's sums, in nats.
    """
    if not found:
        return [NOTHING_TO_COMPARE]
    per_step, windows = found
    went = "fell" if measured >= 0 else "rose"
    total = (
        f"Over all {per_step.count:,} steps with both, the values predict a "
        f"{'fall' if predicted >= 0 else 'rise'} of {abs(predicted):.3g} nats; the loss {went} by "
        f"{abs(measured):.3g} nats"
    )
    total += "." if per_step.ratio is None else f", which is {_times(per_step.ratio)} the prediction."
    text = f"From step to step, {_correlation(per_step)}"
    if windows.count:
        text += f" Over windows of {windows.window} steps added up, {_correlation(windows)}"
    return [total, text]


def _times(ratio: float) -> str:
    return f"{ratio:,.3g} times".replace("-", "−")


def _correlation(found: Efficiency) -> str:
    if found.correlation is None:
        reason = (
            f"fewer than three pairs ({found.count})" if found.count < 3 else "one of the two never changes"
        )
        return f"there is no correlation to compute: {reason}."
    size = abs(found.correlation)
    strength = next((word for least, word in STRENGTHS.items() if size >= least), "next to none")
    shown = f"{found.correlation:+.2f}".replace("-", "−")
    return f"the correlation of predicted and measured fall is {shown} ({strength}; {found.count:,} pairs)."


def _charts(both: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """Return the sketches by name, and under "checks" the names in order, each with its caption."""
    panels = {}
    for window in WINDOWS:
        sums = [[sum_windows(each, window) for each in pair] for _, *pair in select_falls(both)]
        if any(len(predicted) for predicted, _ in sums):
            title = "single steps" if window == 1 else f"windows of {window} steps"
            panels[title] = Falls(*(np.concatenate(side) for side in zip(*sums, strict=True)))
    if not panels:
        return {"checks": []}
    sketches = {"check": sketch_falls(panels)}
    captions = {"check": SCATTER_CAPTION}
    for run, predicted, measured in select_falls(both):
        steps = both.filter(pc.equal(both["run"], run))["step"].to_numpy()
        sketches[f"check_{run}"] = sketch_fall_course(steps, Falls(predicted, measured))
        captions[f"check_{run}"] = f"{names[run]}: {COURSE_CAPTION}" if len(names) > 1 else COURSE_CAPTION
    return {**sketches, "checks": list(captions.items())}
