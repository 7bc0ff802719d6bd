"""The report's check of the values against the measured loss, in sentences and charts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attribution.database import Normalise
from attribution.efficiency import WINDOWS, Efficiency, efficiency, falls, window_sums
from attribution.report.charts import Falls, efficiency_course, efficiency_scatter
from attribution.scored_run import ScoredRun

STRENGTHS = {0.8: "strong", 0.5: "moderate", 0.2: "weak"}  # from that absolute correlation on
ADVICE = {
    (
        "SGD",
        "gradient",
    ): "Values assume a small step along the gradient. SGD makes such steps; what differs is "
    "that they are not small, and weight decay.",
    ("AdamW", "gradient"): "Values assume a small step along the gradient. AdamW makes another, often "
    "far longer one, for which it scales each entry of the gradient: read the values as a ranking of the "
    "samples, not as amounts of loss. (Those of a run with “direction” set to “adamw” follow it.)",
    (
        "AdamW",
        "adamw",
    ): "The values follow AdamW’s scaling of the gradient’s entries (“direction” is “adamw”), but "
    "not its momentum and weight decay. That scaling is extreme in the first steps, and for tokens that were "
    "not seen for long: leave the first steps out (--steps), or let each step count the same (--normalise "
    "absolute).",
}
NOTHING_TO_COMPARE = (
    "No step has a prediction and a loss both before and after it: there is nothing to compare."
)
SCATTER_CAPTION = (
    "A point is the fall of the validation loss in a step, or in a window of steps. The closer the points "
    "are to one rising line, the better do the values tell them apart."
)
COURSE_CAPTION = (
    "Both falls, added up over the steps. The prediction is stretched to the same height, so that the shapes "
    "can be compared."
)


def efficiency_section(runs: Sequence[ScoredRun], steps: pa.Table, normalise: Normalise) -> dict[str, Any]:
    """steps: as in a folder of values."""
    finite = pc.and_(pc.is_finite(steps["predicted"]), pc.is_finite(steps["measured"]))
    both = steps.filter(finite)  # a row without one of them is left out, too
    found = efficiency(both)
    names = [run.folder.resolve().name for run in runs]
    shown = [
        {
            "name": name,
            "folder": str(run.folder),
            "check": sentences([each for each in found if each.run == number], *_totals(both, number)),
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


def sentences(found: Sequence[Efficiency], predicted: float, measured: float) -> list[str]:
    """found: of one run; predicted, measured: its sums, in nats."""
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
            f"less than three pairs ({found.count})" if found.count < 3 else "one of the two never changes"
        )
        return f"there is no correlation to compute: {reason}."
    size = abs(found.correlation)
    strength = next((word for least, word in STRENGTHS.items() if size >= least), "next to none")
    shown = f"{found.correlation:+.2f}".replace("-", "−")
    return f"the correlation of predicted and measured fall is {shown} ({strength}; {found.count:,} pairs)."


def _charts(both: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """The sketches by their names, and, as "checks", these names in order, each with a caption."""
    panels = {}
    for window in WINDOWS:
        sums = [[window_sums(each, window) for each in pair] for _, *pair in falls(both)]
        if any(len(predicted) for predicted, _ in sums):
            title = "single steps" if window == 1 else f"windows of {window} steps"
            panels[title] = Falls(*(np.concatenate(side) for side in zip(*sums, strict=True)))
    if not panels:
        return {"checks": []}
    sketches = {"check": efficiency_scatter(panels)}
    captions = {"check": SCATTER_CAPTION}
    for run, predicted, measured in falls(both):
        steps = both.filter(pc.equal(both["run"], run))["step"].to_numpy()
        sketches[f"check_{run}"] = efficiency_course(steps, Falls(predicted, measured))
        captions[f"check_{run}"] = f"{names[run]}: {COURSE_CAPTION}" if len(names) > 1 else COURSE_CAPTION
    return {**sketches, "checks": list(captions.items())}
