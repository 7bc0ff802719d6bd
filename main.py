"""Train a language model, and know what every training sample does for the validation loss.

python main.py --batch_size 2 --max_steps 20    (--help lists all flags)
"""

import json
import logging
import sys
from contextlib import ExitStack

from transformers.utils import logging as transformers_logging

from config_file import TrainingConfig, describe, resolve
from distributed import distributed_world
from finite_guard import NonFiniteLoss
from ghostEngines.contraction import TILE_NUMEL, Split, Strategy
from ghostEngines.coverage import contraction_plan, covered_layers
from ghostEngines.engine_manager import GhostEngineManager, GradDotProdManager
from ghostEngines.layer_rules.cross_entropy_head import PART_POSITIONS, SOFTMAX_POSITIONS
from ghostEngines.metrics_log import ScoreWriter
from model_setup import CausalLM, Precision, build_model, build_optimizer, load_model
from run_folder import check_result_dir, differences, prepare_result_dir, provenance, save
from run_log import RunLog, check_wandb
from summary import print_summary
from training_data import TrainingData, check_tokens
from training_loop import Trainer, check_evaluation, evaluate, to_device
from validation_rows import save_validation_rows

logger = logging.getLogger("main")


def main(argv: list[str]) -> int:
    """Runs what the command line asks for. Returns the exit status: 0; 1 for a loss that is not finite; 130
    after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()
    config = TrainingConfig.from_command_line(argv)
    with ExitStack() as resources:
        try:
            config = resolve(config)
            world = resources.enter_context(distributed_world())
            check_result_dir(config)
            data = resources.enter_context(TrainingData.open(config, world))
            model = prepare_model(config)
            check_tokens(data.blocks, model.hf.config.vocab_size)
            check_wandb(config)
            prepare_result_dir(config)
        except ValueError as error:  # of the user's making: said in a line, without a traceback
            print(f"main.py: error: {error}", file=sys.stderr)
            return 2
        logger.info("%s\n", describe(config))
        if config.eval_only:
            return evaluate_only(config, model, data)
        save(config, config.result_dir / "config.json", provenance() | computation(config, model))
        optimizer = build_optimizer(model, config)
        manager = build_manager(config, model, optimizer, data, world.rank)
        log = resources.enter_context(RunLog(config))
        trainer = Trainer(config, model, optimizer, manager, data, log, world)
        status = train(trainer)
    if trainer.progress.steps:
        print_summary(config, trainer.progress, data)
    return status


def prepare_model(config: TrainingConfig) -> CausalLM:
    """A new model, or for --eval_only the one that the named run saved."""
    if config.eval_only and config.saved_model is not None:
        return load_model(config.saved_model, config)
    return build_model(config)


def build_manager(
    config: TrainingConfig, model: CausalLM, optimizer, data: TrainingData, rank: int
) -> GhostEngineManager:
    """The method's manager. GradDotProd writes its scores and the validation rows that they refer to."""
    if config.method == "Regular":
        return GhostEngineManager()
    val_x, val_y = to_device(data.validation, Precision.of(config).device)
    validation_hash = save_validation_rows(data.validation, data.tokenizer, config.result_dir / "validation")
    metadata = {
        "run_configuration": (config.result_dir / "config.json").read_text(encoding="utf-8"),
        "validation_sha256": validation_hash,
        "block_size": str(config.block_size),
        "split": config.train_set,
        "shard_sha256": json.dumps(data.blocks["train"].checksums),
        "domains": json.dumps(data.blocks["train"].all_domains),  # whose places are the sample ids' high bits
        "layers": json.dumps(list(covered_layers(model))),  # the order of per-layer scores
    }
    scores = ScoreWriter(
        config.result_dir / "grad_dotprods",
        rank=rank,
        metadata=metadata,
        granularity=config.score_granularity,
    )
    return GradDotProdManager(
        model,
        optimizer,
        val_x=val_x,
        val_y=val_y,
        scores=scores,
        save_interval=config.dot_prod_save_interval,
        granularity=config.score_granularity,
        strategy=forced_strategy(config),
    )


def forced_strategy(config: TrainingConfig) -> Strategy | None:
    """--contraction, None for auto."""
    return None if config.contraction == "auto" else config.contraction


def computation(config: TrainingConfig, model: CausalLM) -> dict[str, object]:
    """How dot products are computed, for config.json: the strategy of each layer, and the head's chunks."""
    if config.method == "Regular":
        return {}
    split = Split(config.batch_size, config.val_batch_size, config.score_granularity == "pairwise")
    plan = contraction_plan(covered_layers(model), split, config.block_size, forced_strategy(config))
    return {
        "contraction_by_layer": plan,
        "tile_numel": TILE_NUMEL,
        "head_part_positions": PART_POSITIONS,
        "head_softmax_positions": SOFTMAX_POSITIONS,
    }


def train(trainer: Trainer) -> int:
    """Trains to the end, and says how it ended."""
    try:
        trainer.run()
    except KeyboardInterrupt:
        logger.warning("interrupted after step %d: scores and model are saved", trainer.progress.steps)
        return 130
    except NonFiniteLoss as error:
        logger.error("main.py: error: %s", error)
        return 1
    return 0


def evaluate_only(config: TrainingConfig, model: CausalLM, data: TrainingData) -> int:
    """--eval_only: the losses on the three splits, and nothing is written."""
    for difference in differences(config):
        logger.info("other than in the run itself: %s", difference)
    losses = evaluate(model, data, config, Precision.of(config))
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
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before there was anything to save
        sys.exit(130)
