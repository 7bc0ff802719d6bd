"""Build the report's section on the audit: how far the values can be trusted, in sentences and charts."""

from typing import Any

import numpy as np
import pyarrow as pa

from attribution.audit import audit_lines, audited_rows, audited_steps, phase_name
from attribution.database import ScoreDatabase
from attribution.report.charts import Pairs, sketch_agreement, sketch_parts

AGREEMENT_CAPTION = (
    "A point is a sample in an audited step; both of its values are shown without the mean of its batch. Points on "
    "the dotted line have the same value in pass as exactly."
)
PARTS_CAPTION = (
    "What made the validation loss fall in the audited steps: the values of the step’s samples, the momentum of "
    "earlier steps’ samples, and weight decay. Together they should meet the measured falls."
)


def build_audit_section(database: ScoreDatabase, audit: pa.Table) -> dict[str, Any]:
    """Return the template variables of the section. audit: as in a folder of values."""
    runs = database.runs
    charts: dict[str, Any] = {}
    captions = {}
    rows = audited_rows(database)
    phases, x, y = (rows[name].to_numpy() for name in ("phase", "x", "y"))
    if len(rows):
        panels = {
            phase_name(int(phase)): Pairs(x[phases == phase], y[phases == phase])
            for phase in np.unique(phases)
        }
        charts["audit"], captions["audit"] = sketch_agreement(panels), AGREEMENT_CAPTION
    for number, run in enumerate(runs):
        steps = audited_steps(database, number)
        if len(steps):
            parts = {"values": "of_batch", "momentum": "momentum", "decay": "decay"}
            charts[f"audit_{number}"] = sketch_parts(
                steps["step"].to_numpy(),
                {label: steps[name].to_numpy() for label, name in parts.items()},
                steps["measured"].to_numpy(),
            )
            name = f"{run.folder.resolve().name}: " if len(runs) > 1 else ""
            captions[f"audit_{number}"] = name + PARTS_CAPTION
    return {
        "kind": runs[0].kind,
        "audit_lines": audit_lines(runs, audit),
        **charts,
        "checks": list(captions.items()),
    }
