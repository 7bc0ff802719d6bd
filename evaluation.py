"""The losses of a model on train, val and test."""

import logging
import math
from collections.abc import Callable

import torch
from torch.distributed.fsdp import FSDPModule

from config_file import TrainingConfig
from dataloader import BatchLoader, TrainingData
from model_setup import Precision
from models.causal_lm import CausalLM
from run.ending import OK
from run.finite_guard import NonFiniteLoss
from run.folder import differences
from run.processes import World

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: CausalLM,
    data: TrainingData,
    config: TrainingConfig,
    precision: Precision,
    world: World,
    between: Callable[[], None],
) -> dict[str, float]:
    """Return the mean losses on train, val and test, in nats per token.

    They are over --eval_iter batches of --eval_bs rows, the same ones every time, divided among the processes.

    Args:
        between: called before each batch.
    """
    try:
        return {
            name: mean_loss(model, loader, config, precision, world, between)
            for name, loader in data.evaluation.items()
        }
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # its outermost group waits for a backward pass that does not come


def mean_loss(
    model: CausalLM,
    loader: BatchLoader,
    config: TrainingConfig,
    precision: Precision,
    world: World,
    between: Callable[[], None],
) -> float:
    """Return the mean loss over one split."""
    total = torch.zeros(2, dtype=torch.float64, device=precision.device)  # sum of losses, rows
    for first in range(0, config.eval_iter, world.size):
        between()
        index = first + world.rank
        # a process without a batch of its own repeats the last: the parts of a model that is divided among
        # processes come together in every forward pass
        inputs = loader.batch(min(index, config.eval_iter - 1)).to(precision.device)
        with precision.autocast():
            losses = model(*inputs)
        if index < config.eval_iter:
            total += torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
    losses_sum, rows = world.sum(total).tolist()
    mean: float = losses_sum / rows
    return mean


def check_evaluation(losses: dict[str, float]) -> None:
    """Raise NonFiniteLoss unless all losses are finite."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss on {name} is {loss}: the parameters are of no use; see metrics.jsonl"
            )


def evaluate_only(config: TrainingConfig, model: CausalLM, data: TrainingData, world: World) -> int:
    """Log the losses on the three splits for --eval_only, and return the exit status. Nothing is written."""
    for difference in differences(config):
        logger.info("other than in the run itself: %s", difference)
    losses = evaluate(model, data, config, Precision.of(config), world, lambda: None)
    for name, loss in losses.items():
        logger.info("loss on %s: %.4f", name, loss)
    check_evaluation(losses)
    return OK
