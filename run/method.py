"""The methods: what each adds to training, and what it writes."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ghostEngines.contraction import SIDE, TILE_NUMEL, Split
from ghostEngines.covered_layers import contraction_plan, cover
from ghostEngines.engine_manager import GhostEngineManager, GradDotProdManager
from ghostEngines.layer_rules.cross_entropy_head import GPU_POSITIONS, PART_POSITIONS, SOFTMAX_POSITIONS
from ghostEngines.scoring import Scoring
from ghostEngines.strategies.instantiate import GPU_NUMEL
from models.causal_lm import CausalLM
from run.checkpoint import step_of
from run.folder import lasting
from run.processes import World
from score_store.samples import KEPT, write_samples
from score_store.validation_rows import hash_of_rows, save_validation_rows
from score_store.writer import ScoreWriter, drop_rows_from

if TYPE_CHECKING:
    from config_file import TrainingConfig
    from dataloader import TrainingData


@dataclass(frozen=True)
class Training:
    """What a method's manager is made of."""

    config: "TrainingConfig"
    model: CausalLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: "TrainingData"
    world: World
    start: Path | None  # the checkpoint that the run resumes from
    autocast: Callable[[], AbstractContextManager[Any]]  # of a forward pass


@dataclass(frozen=True)
class Method:
    """A way to train: what it adds to a step, and whether it writes scores."""

    build: Callable[[Training], GhostEngineManager]
    scores: bool


def regular(training: Training) -> GhostEngineManager:
    """Return the manager of plain training."""
    return GhostEngineManager(training.config.gradient_accumulation_steps)


def grad_dot_prod(training: Training) -> GhostEngineManager:
    """Return the manager that scores every training sample, attached to the model.

    It writes scores and, when a run begins, the validation rows that they refer to. A run that resumes drops the
    scores of the steps after its checkpoint, which it computes again.
    """
    config, model, data = training.config, training.model, training.data
    device = torch.device(config.device)
    assert config.audit_interval is not None, "not resolved"
    return GradDotProdManager(
        model,
        training.optimizer,
        validation=data.validation.to(device),
        scores=open_scores_to_write(config, model, data, training.world, training.start),
        scoring=Scoring(
            save_interval=config.dot_prod_save_interval,
            every_exact=config.values == "exact",
            by_target=config.exact_by_target,
            audit_interval=config.audit_interval,
            lookahead=config.validation_point == "lookahead",
            refresh_interval=config.val_refresh_interval,
        ),
        autocast=training.autocast,
        granularity=config.score_granularity,
        direction=config.direction,
        strategy=config.strategy,
        micro_batches=config.gradient_accumulation_steps,
        guard=config.row_guard,
        loss_scale=lambda: training.scaler.scale(torch.ones((), device=device)),
    )


METHODS = {"GradDotProd": Method(grad_dot_prod, scores=True), "Regular": Method(regular, scores=False)}


def build_manager(training: Training) -> GhostEngineManager:
    """Return the manager of the run's method."""
    return METHODS[training.config.method].build(training)


def open_scores_to_write(
    config: "TrainingConfig", model: nn.Module, data: "TrainingData", world: World, start: Path | None
) -> ScoreWriter:
    """Return this process's writer of scores; rank 0 puts the folder in order first."""
    identity: dict[str, Any] = {
        "metadata": score_metadata(config, model, data),
        "granularity": config.score_granularity,
        "values": config.values,
        "by_target": config.exact_by_target,
    }
    if world.rank == 0 and start is None:
        save_validation_rows(data.validation, data.shown(data.validation), config.folder.validation_rows)
        if (samples := data.kept_samples()) is not None:
            write_samples(config.folder.samples, samples)
    if world.rank == 0 and start is not None:
        drop_rows_from(config.folder.scores, step_of(start), **identity)
    world.wait()
    return ScoreWriter(config.folder.scores, rank=world.rank, **identity)


def score_metadata(config: "TrainingConfig", model: nn.Module, data: "TrainingData") -> dict[str, str]:
    """Return what every score file says of its run: what distinguishes it from other runs, and what its ids mean."""
    train = data.blocks["train"]
    kept = {} if data.kept_samples() is None else {"samples": KEPT}
    return kept | {
        "run_configuration": json.dumps(lasting(config)),
        "validation_sha256": hash_of_rows(data.validation),
        "block_size": str(config.block_size),
        "split": config.train_set,
        "shard_sha256": json.dumps(train.checksums),
        "domains": json.dumps(train.all_domains),  # whose places are the sample ids' high bits
        "layers": json.dumps(list(cover(model).layers)),  # the order of per-layer scores
    }


def computation(config: "TrainingConfig", model: nn.Module) -> dict[str, object]:
    """Return how dot products are computed, for config.json: each layer's strategy, and the sizes of tiles and
    of the head's parts."""
    if not config.computes_scores:
        return {}
    m = 0 if config.own_validation_passes else config.val_batch_size
    split = Split(
        config.batch_size,
        m,
        config.score_granularity == "pairwise",
        positions=config.block_size if config.score_granularity == "token" else 0,
    )
    preconditioned = config.direction == "auto" and config.optimizer == "AdamW"
    by_direction = config.gradient_accumulation_steps > 1 or preconditioned or config.own_validation_passes
    return {
        "contraction_by_layer": contraction_plan(
            cover(model), split, config.block_size, config.strategy, by_direction
        ),
        "tile_numel": TILE_NUMEL,
        "tile_side": SIDE,
        "gpu_numel": GPU_NUMEL,
        "head_part_positions": PART_POSITIONS,
        "head_softmax_positions": SOFTMAX_POSITIONS,
        "head_gpu_positions": GPU_POSITIONS,
    }
