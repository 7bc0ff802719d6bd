"""Train a language model, and know what every training sample does for the validation loss.

python main.py --batch_size 2 --max_steps 20    (--help lists all flags)
"""

import io
import logging
import os
import sys
from contextlib import ExitStack

# Before pyarrow is imported: its own allocator keeps more with every merge of score files, 351 MB after
# 48,000 steps of two rows where this one has 259.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

from transformers.utils import logging as transformers_logging

from config_file import ROOT, describe, read_command_line, resolve
from dataloader import TrainingData, check_tokens
from evaluation import evaluate_only
from model_setup import Precision, build_optimizer, parallelise, prepare_model
from run.ending import exit_status
from run.folder import provenance, save
from run.log import open_log
from run.method import Training, build_manager, computation
from run.opening import agree, find_start, open_folder
from run.processes import distributed_world, first_of_machine
from run.signals import stop_signals
from run.summary import print_summary
from training_loop import Trainer

logger = logging.getLogger("main")


def main(argv: list[str]) -> int:
    """Run what the command line asks for and return the exit status (run.ending.exit_status)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()
    return exit_status("main.py", lambda resources: run(argv, resources))


def run(argv: list[str], resources: ExitStack) -> int:
    """Run as one process of possibly several and return the exit status. The caller closes the resources.

    Raises:
        UserError: what was asked for cannot be done, or a file cannot be read or written.
        NonFiniteLoss: a loss of an evaluation with --eval_only.
    """
    # Parse
    config = resolve(read_command_line(argv, heard=first_of_machine()))
    world = resources.enter_context(distributed_world(config))
    config = agree(config, world)

    # Open
    data = world.every(lambda: resources.enter_context(TrainingData.open(config, world)))
    start = world.first(lambda: find_start(config, world, data, resources))
    model = world.every(lambda: prepare_model(config, start))
    world.every(lambda: check_tokens(data.blocks, model.vocabulary, config.model_folder))
    world.first(lambda: open_folder(config, world, model, start, resources))
    logger.info("%s\n", describe(config))
    if config.eval_only:
        return evaluate_only(config, model, data, world)
    world.first(lambda: save(config, config.folder.config, provenance(ROOT) | computation(config, model)))

    # Build
    parallel = parallelise(model, config, world)
    optimizer = build_optimizer(model, config)
    precision = Precision.of(config)
    scaler = precision.grad_scaler()
    training = Training(config, model, optimizer, scaler, data, world, start, precision.autocast)
    manager = build_manager(training)
    stop = resources.enter_context(stop_signals(wait=world.size > 1))
    with open_log(config, world, start) as log:
        trainer = Trainer(training, parallel, manager, log, stop)

        # Train
        status = trainer.train()

    # Close
    world.wait()  # until all scores are on the disk of every process
    if trainer.progress.steps and world.rank == 0:
        print_summary(config, trainer.progress, data)
    return status


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="replace")  # the table shows texts of any language
    sys.exit(main(sys.argv[1:]))
