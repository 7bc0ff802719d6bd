"""Open a run: settle what the processes must agree on, find its checkpoint, make or take its folder."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from foundation.errors import ConfigError
from run.checkpoint import RUN_CONFIG, find_checkpoint, read_manifest, remove_after, step_of
from run.file_system import check_file_system
from run.folder import changes, check_result_dir, locked, prepare_result_dir, settle_resume, try_result_dir
from run.log import check_wandb
from run.parts import check_parts
from run.processes import World
from run.state import checkpoint_facts, global_batch_size, space_needed

if TYPE_CHECKING:
    from config_file import TrainingConfig
    from dataloader import TrainingData

logger = logging.getLogger(__name__)


def agree(config: "TrainingConfig", world: World) -> "TrainingConfig":
    """Return rank 0's configuration on every rank, with --resume auto settled, after asking for all that the
    run's folder, its file system and Weights & Biases would refuse later.

    Raises:
        UserError: they refuse; nothing was loaded or made by then.
    """
    if world.rank > 0:
        logging.getLogger().setLevel(logging.ERROR)
    config = world.gather(config)[0]  # the run's name has the time in it
    config = world.first(lambda: settle_resume(config))
    world.first(lambda: _check_before(config))
    return config


def _check_before(config: "TrainingConfig") -> None:
    check_result_dir(config)
    if not config.eval_only:
        try_result_dir(config)
        check_wandb(config)


def find_start(
    config: "TrainingConfig", world: World, data: "TrainingData", resources: ExitStack
) -> Path | None:
    """Return the checkpoint that --resume or --resume_from names, with the run's folder locked for as long as the
    resources are held; None for a run that begins.

    Raises:
        ConfigError: the checkpoint is missing, damaged, or of a run with other settings, data or global batch;
            another process works in the folder; files are missing that the run wrote before.
    """
    if not config.resumes:
        return None
    resources.enter_context(locked(config))
    checkpoint = find_checkpoint(config.folder.checkpoints, config.resume_from)
    manifest = read_manifest(checkpoint)
    found = changes(config, checkpoint / RUN_CONFIG)
    facts = checkpoint_facts(config, world, data)
    if missing := [name for name in (*facts, "evaluation_due") if name not in manifest]:
        raise ConfigError(
            f"--resume: {checkpoint} does not say its {', '.join(missing)}: another version of this program "
            "wrote it; resume with that version"
        )
    found += [
        f"{name} is {facts[name]}, was {manifest[name]}" for name in facts if facts[name] != manifest[name]
    ]
    if found:
        raise ConfigError(f"--resume: not the run that made {checkpoint}: {'; '.join(found)}")
    if step_of(checkpoint) > config.max_steps:
        raise ConfigError(
            f"--resume: {checkpoint} is beyond --max_steps {config.max_steps}: give more, or --resume_from "
            "an earlier one"
        )
    check_parts(config, checkpoint, global_batch_size(config, world))
    logger.info("resuming from %s", checkpoint)
    return checkpoint


def open_folder(
    config: "TrainingConfig", world: World, model: nn.Module, start: Path | None, resources: ExitStack
) -> None:
    """Make the run's folder, or take the one that is resumed; keep other runs out for as long as the resources
    are held. An evaluation makes nothing.

    Args:
        start: the checkpoint that the run resumes from.

    Raises:
        ConfigError: the file system lacks what the run will need.
    """
    if config.eval_only:
        return
    space = space_needed(config, world, model, start)
    if start is None:
        prepare_result_dir(config, resources, space)
    else:
        check_file_system(config.result_dir, space)
        remove_after(start)
