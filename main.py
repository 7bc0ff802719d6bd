"""Train a language model, and know what every training sample does for the validation loss.

python main.py --batch_size 2 --max_steps 20    (--help lists all flags)
"""

import json
import logging
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

# Before pyarrow is imported: its own allocator keeps more with every merge of score files, 351 MB after
# 48,000 steps of two rows where this one has 259.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

import torch
from transformers.utils import logging as transformers_logging

from config_file import TrainingConfig, describe, resolve
from dataloader import TrainingData, check_tokens, to_device
from evaluation import check_evaluation, evaluate
from foundation.errors import ConfigError, UserError
from ghostEngines.contraction import SIDE, TILE_NUMEL, Split
from ghostEngines.covered_layers import contraction_plan, cover
from ghostEngines.engine_manager import GhostEngineManager, GradDotProdManager
from ghostEngines.layer_rules.cross_entropy_head import PART_POSITIONS, SOFTMAX_POSITIONS
from ghostEngines.strategies.instantiate import GPU_NUMEL
from model_setup import CausalLM, Precision, build_model, build_optimizer, load_model, parallelise
from run.checkpoint import (
    RUN_CONFIG,
    find_checkpoint,
    find_saved_model,
    read_manifest,
    remove_after,
    step_of,
)
from run.file_system import check_file_system
from run.finite_guard import NonFiniteLoss
from run.folder import (
    changes,
    check_result_dir,
    differences,
    lasting,
    locked,
    prepare_result_dir,
    provenance,
    save,
    settle_resume,
    try_result_dir,
)
from run.log import RunLog, SilentLog, check_wandb
from run.parts import check_parts
from run.processes import SharedError, World, distributed_world, first_of_machine
from run.signals import Interrupted, drop_closed_outputs, stop_signals
from run.state import checkpoint_facts, global_batch_size, space_needed
from run.summary import print_summary
from score_store.validation_rows import hash_of_rows, save_validation_rows
from score_store.writer import ScoreWriter, drop_rows_from
from training_loop import Trainer

logger = logging.getLogger("main")


def main(argv: list[str]) -> int:
    """Runs what the command line asks for. Returns the exit status: 0; 1 for a loss that is not finite; 2 for
    what cannot be run as asked; 128 and the signal's number after one that stopped the run, so 130 after
    Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()
    try:
        return run(read_command_line(argv))
    except KeyboardInterrupt as error:  # before there was anything to save
        return stopped_by(error)


def read_command_line(argv: list[str]) -> TrainingConfig:
    """What is wrong in it ends the program, and is said by one process of each machine."""
    if first_of_machine():
        return TrainingConfig.from_command_line(argv)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return TrainingConfig.from_command_line(argv)


def run(config: TrainingConfig) -> int:
    """Run a configuration and return the exit status; report a user error in one line."""
    world = None
    with ExitStack() as resources:
        try:
            config = resolve(config)
            world = resources.enter_context(distributed_world(config))
            return run_in(world, config, resources)
        except UserError as error:
            # Without a process group every process of a machine meets the same error.
            if not (world is None or isinstance(error, SharedError)) or first_of_machine():
                print(f"main.py: error: {error}", file=sys.stderr)
            return 2


def run_in(world: World, config: TrainingConfig, resources: ExitStack) -> int:
    """Run as one process of `world` and return the exit status. `resources` are closed by the caller.

    Raises:
        UserError: what was asked for cannot be done, or a file cannot be read or written.
    """
    if world.rank > 0:
        logging.getLogger().setLevel(logging.ERROR)
    config = world.gather(config)[0]  # the name of a run has the time in it
    config = world.first(lambda: settle_resume(config))
    world.first(lambda: check_before(config))
    data = world.every(lambda: resources.enter_context(TrainingData.open(config, world)))
    checkpoint = world.first(lambda: find_resumed(config, world, data, resources))
    model = world.every(lambda: prepare_model(config, checkpoint, data))
    world.first(lambda: open_folder(config, checkpoint, model, world, resources))
    logger.info("%s\n", describe(config))
    if config.eval_only:
        return evaluate_only(config, model, data, world)
    world.first(lambda: save(config, config.folder.config, provenance() | computation(config, model)))
    parallel = parallelise(model, config, world)
    optimizer = build_optimizer(model, config)
    step = 0 if checkpoint is None else step_of(checkpoint)
    scaler = Precision.of(config).grad_scaler()
    manager = build_manager(config, model, optimizer, data, world, step, scaler)
    due = checkpoint is not None and read_manifest(checkpoint)["evaluation_due"]
    stop = resources.enter_context(stop_signals(wait=world.size > 1))
    with RunLog(config, step, due) if world.rank == 0 else SilentLog() as log:
        trainer = Trainer(config, model, parallel, optimizer, manager, data, log, world, stop, scaler)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        status = train(trainer)
    world.wait()  # all scores are on the disk, and the log is closed; else none ends as if all were well
    if trainer.progress.steps and world.rank == 0:
        print_summary(config, trainer.progress, data)
    return status


def check_before(config: TrainingConfig) -> None:
    """Ask, before anything is loaded or made, for all that the run's folder, its file system and Weights &
    Biases would refuse later. Raises UserError."""
    check_result_dir(config)
    if not config.eval_only:
        try_result_dir(config)
        check_wandb(config)


def find_resumed(
    config: TrainingConfig, world: World, data: TrainingData, resources: ExitStack
) -> Path | None:
    """The checkpoint that --resume or --resume_from means; None for a run that begins.

    Raises ConfigError if it is not there, not whole, or of a run with other settings, data, or another global
    batch, if that run is still at work, and if files are missing that it wrote before."""
    if not config.resumes:
        return None
    resources.enter_context(locked(config))
    checkpoint = find_checkpoint(config.folder.checkpoints, config.resume_from)
    manifest = read_manifest(checkpoint)
    found = changes(config, checkpoint / RUN_CONFIG)
    now = checkpoint_facts(config, world, data)
    if missing := [name for name in (*now, "evaluation_due") if name not in manifest]:
        raise ConfigError(
            f"--resume: {checkpoint} does not say its {', '.join(missing)}: another version of this program "
            "wrote it; resume with that version"
        )
    found += [f"{name} is {now[name]}, was {manifest[name]}" for name in now if now[name] != manifest[name]]
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
    config: TrainingConfig, checkpoint: Path | None, model: CausalLM, world: World, resources: ExitStack
) -> None:
    """The run's folder, made or ready to go on, and for this run alone as long as the resources are held.
    ConfigError if its file system lacks what the run will need."""
    if config.eval_only:
        return
    space = space_needed(config, world, model, checkpoint)
    if checkpoint is None:
        prepare_result_dir(config, resources, space)
    else:
        check_file_system(config.result_dir, space)
        remove_after(checkpoint)


def prepare_model(config: TrainingConfig, checkpoint: Path | None, data: TrainingData) -> CausalLM:
    """The model of the checkpoint; for --eval_only the one that the named run saved; the one of --init_from;
    or a new one. ValueError if it cannot be read, or has no row for a token id of the data."""
    model = choose_model(config, checkpoint)
    check_tokens(data.blocks, model.hf.config.vocab_size)
    return model


def choose_model(config: TrainingConfig, checkpoint: Path | None) -> CausalLM:
    if checkpoint is not None:
        return load_model(checkpoint, config)
    if config.eval_only and config.saved_model is not None:
        return load_model(find_saved_model(config.saved_model), config)
    if config.init_from is not None:
        return load_model(Path(config.init_from), config, drop_dropout=True)
    return build_model(config)


def build_manager(
    config: TrainingConfig,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    data: TrainingData,
    world: World,
    step: int,
    scaler: torch.amp.GradScaler,
) -> GhostEngineManager:
    """The method's manager. GradDotProd writes its scores and the validation rows that they refer to; scores
    of `step` and later ones, which will be computed again, are removed."""
    micro_batches = config.gradient_accumulation_steps
    if config.method == "Regular":
        return GhostEngineManager(micro_batches)
    val_x, val_y = to_device(data.validation, Precision.of(config).device)
    if world.rank == 0 and not config.resumes:
        save_validation_rows(data.validation, data.tokenizer, config.folder.validation_rows)
    metadata = {
        "run_configuration": json.dumps(lasting(config)),
        "validation_sha256": hash_of_rows(data.validation),
        "block_size": str(config.block_size),
        "split": config.train_set,
        "shard_sha256": json.dumps(data.blocks["train"].checksums),
        "domains": json.dumps(data.blocks["train"].all_domains),  # whose places are the sample ids' high bits
        "layers": json.dumps(list(cover(model).layers)),  # the order of per-layer scores
    }
    folder = config.folder.scores
    if world.rank == 0 and config.resumes:
        drop_rows_from(folder, step, metadata=metadata, granularity=config.score_granularity)
    world.wait()
    scores = ScoreWriter(folder, rank=world.rank, metadata=metadata, granularity=config.score_granularity)
    return GradDotProdManager(
        model,
        optimizer,
        val_x=val_x,
        val_y=val_y,
        scores=scores,
        save_interval=config.dot_prod_save_interval,
        granularity=config.score_granularity,
        direction=config.direction,
        strategy=forced_strategy(config),
        micro_batches=micro_batches,
        guard=config.row_guard,
        loss_scale=lambda: scaler.scale(torch.ones((), device=val_x.device)),
    )


def forced_strategy(config: TrainingConfig) -> str | None:
    """--contraction, None for auto."""
    return None if config.contraction == "auto" else config.contraction


def computation(config: TrainingConfig, model: CausalLM) -> dict[str, object]:
    """How dot products are computed, for config.json: the strategy of each layer, and the head's chunks."""
    if config.method == "Regular":
        return {}
    split = Split(config.batch_size, config.val_batch_size, config.score_granularity == "pairwise")
    by_direction = config.gradient_accumulation_steps > 1 or config.direction == "adamw"
    plan = contraction_plan(cover(model), split, config.block_size, forced_strategy(config), by_direction)
    return {
        "contraction_by_layer": plan,
        "tile_numel": TILE_NUMEL,
        "tile_side": SIDE,
        "gpu_numel": GPU_NUMEL,
        "head_part_positions": PART_POSITIONS,
        "head_softmax_positions": SOFTMAX_POSITIONS,
    }


def train(trainer: Trainer) -> int:
    """Trains to the end, and says how it ended."""
    try:
        trainer.run()
    except KeyboardInterrupt as error:
        drop_closed_outputs()
        logger.warning(
            "interrupted after step %d: scores and a checkpoint are saved; --resume --run_name %s goes on",
            trainer.progress.steps,
            trainer.config.run_name,
        )
        return stopped_by(error)
    except NonFiniteLoss as error:
        logger.error("main.py: error: %s", error)
        return 1
    return 0


def stopped_by(error: KeyboardInterrupt) -> int:
    """The exit status, as a shell says it."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def evaluate_only(config: TrainingConfig, model: CausalLM, data: TrainingData, world: World) -> int:
    """--eval_only: the losses on the three splits, and nothing is written."""
    for difference in differences(config):
        logger.info("other than in the run itself: %s", difference)
    losses = evaluate(model, data, config, Precision.of(config), world, lambda: None)
    for name, loss in losses.items():
        logger.info("loss on %s: %.4f", name, loss)
    try:
        check_evaluation(losses)
    except NonFiniteLoss as error:
        logger.error("main.py: error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the table shows texts of any language
    sys.exit(main(sys.argv[1:]))
