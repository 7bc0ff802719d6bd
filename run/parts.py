"""Check that all that a run wrote before a checkpoint exists, so that it can resume without a gap."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from foundation.errors import ConfigError, file_errors
from run.checkpoint import check_model_link, step_of
from run.log import records_before
from score_store.writer import open_scores

if TYPE_CHECKING:
    from config_file import TrainingConfig


def check_parts(config: "TrainingConfig", checkpoint: Path, global_batch: int) -> None:
    """Check the files that earlier steps wrote and no later step can make again, and the link to the model.

    Args:
        global_batch: samples in one optimizer step, each of which has a score.

    Raises:
        ConfigError: one is missing or cannot be read, or scores of earlier steps are missing; the message
        says what to copy. Something else is in the link's place.
        UserError: metrics.jsonl or a score file is damaged.
    """
    with file_errors(config.result_dir, ConfigError):
        _check_parts(config, checkpoint, global_batch)


def _check_parts(config: "TrainingConfig", checkpoint: Path, global_batch: int) -> None:
    step, folder = step_of(checkpoint), config.folder
    check_model_link(folder.model)
    if step == 0:
        return
    scored = config.computes_scores
    parts = [folder.metrics] + scored * [folder.scores, folder.validation_rows]
    if missing := [str(part.relative_to(folder.root)) for part in parts if not part.exists()]:
        raise ConfigError(
            f"--resume: {folder.root} lacks {', '.join(missing)} of the steps before {checkpoint.name}: copy the "
            f"whole folder of the run, or begin a new run from its weights with --init_from {checkpoint}"
        )
    records_before(folder.metrics, step)
    if not scored:
        return
    rows = open_scores(folder.scores).count_rows(filter=pc.field("step") < step)
    if rows != step * global_batch:
        raise ConfigError(
            f"--resume: {folder.scores} has {rows} scores of the steps before {checkpoint.name}, and "
            f"the run had {step * global_batch} samples in them: copy the whole folder of the run, or resume "
            "from an earlier checkpoint with --resume_from"
        )
