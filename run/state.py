"""What a run needs to resume as if it had not been stopped: into a checkpoint, and out of it."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from foundation.granularity import parts_per_sample
from ghostEngines.engine_manager import GhostEngineManager
from run import checkpoint
from run.file_system import Space
from run.processes import World
from score_store.validation_rows import hash_of_rows

if TYPE_CHECKING:
    from config_file import TrainingConfig
    from dataloader import TrainingData
    from models.causal_lm import CausalLM

SCORE_BYTES = 26  # of a sample's row in one step, compressed, without its parts


@dataclass
class Progress:
    """What a run has to show at any moment. tokens, seconds: of training alone. train_loss (): of the last
    step, on the device; loss_shown: as of the last look at it."""

    steps: int = 0
    resumed_at: int = 0  # how many of the steps were made before this process went on with the run
    tokens: int = 0
    seconds: float = 0.0
    train_loss: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    loss_shown: float = math.nan
    tokens_logged: int = 0  # tokens and seconds at the last record
    seconds_logged: float = 0.0
    evaluation: dict[str, float] | None = None
    evaluation_due: bool = False  # after the last step, and not made yet


@dataclass
class TrainingState:
    """All that changes in the course of a run. parallel: what model_setup.parallelise made of the model."""

    KEYS: ClassVar = (
        "optimizer",
        "scaler",
        "random",
        "scores",
        "tokens",
        "seconds",
        "evaluation_due",
        "evaluation",
    )

    model: "CausalLM"
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    manager: GhostEngineManager
    progress: Progress = field(default_factory=Progress)

    def save(self, config: "TrainingConfig", world: World, facts: dict[str, object]) -> None:
        """Write a checkpoint of the state after the last recorded step. Every process must call this; rank 0 writes.

        Args:
            facts: see `checkpoint_facts`.

        Raises:
            CheckpointError: it cannot be written.
        """
        sharded = isinstance(self.parallel, FSDPModule)
        if world.rank > 0 and not sharded:
            return  # rank 0 has all of it; else the parts of all come together
        weights = checkpoint.model_state(self.model.hf, sharded=sharded) if sharded else None
        progress = self.progress
        state = {
            "optimizer": self._optimizer_state(sharded),
            "scaler": self.scaler.state_dict(),
            "random": checkpoint.random_state(),
            "scores": self.manager.state(),
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "evaluation_due": progress.evaluation_due,
            "evaluation": progress.evaluation,
        }

        assert tuple(state) == self.KEYS, state.keys()

        def write(folder: Path) -> None:
            self.model.hf.save_pretrained(folder, state_dict=weights)
            torch.save(state, folder / checkpoint.TRAINER_STATE)
            shutil.copy(config.folder.config, folder / checkpoint.RUN_CONFIG)

        if world.rank == 0:
            folder = config.folder.checkpoints
            facts = facts | {"evaluation_due": progress.evaluation_due}
            checkpoint.write_checkpoint(folder, progress.steps, write, facts, config.keep_checkpoints)

    def _optimizer_state(self, sharded: bool) -> dict[str, Any] | None:
        """Return the optimizer's state; None if it has none, before the first step and for plain SGD.

        PyTorch would make a step of length zero to have a state to save or to load into.
        """
        if not self.optimizer.state:
            return None
        return checkpoint.optimizer_state(self.model, self.optimizer, sharded=sharded)

    def load(self, folder: Path) -> None:
        """Load everything but the weights, which the model has already. Every process must call this.

        Raises:
            CheckpointError: another version of this program wrote the checkpoint.
        """
        path = folder / checkpoint.TRAINER_STATE
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := [name for name in self.KEYS if name not in state]:
            raise checkpoint.CheckpointError(
                f"{path} lacks {', '.join(missing)}: another version of this program wrote it; resume with "
                "that version"
            )
        sharded = isinstance(self.parallel, FSDPModule)
        if state["optimizer"] is not None:
            checkpoint.load_optimizer_state(self.model, self.optimizer, state["optimizer"], sharded=sharded)
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.set_random_state(state["random"])
        self.manager.load_state(state["scores"])
        progress = self.progress
        progress.steps = progress.resumed_at = checkpoint.step_of(folder)
        progress.tokens = progress.tokens_logged = state["tokens"]
        progress.seconds = progress.seconds_logged = state["seconds"]
        progress.evaluation_due, progress.evaluation = state["evaluation_due"], state["evaluation"]


def space_needed(config: "TrainingConfig", world: World, model: nn.Module, start: Path | None) -> Space:
    """Return how many bytes the run will write, in checkpoints and scores. start: the checkpoint that it goes
    on from."""
    done = 0 if start is None else checkpoint.step_of(start)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    one = parameters * (3 if config.optimizer == "AdamW" else 1)  # AdamW keeps two moments of each
    one += parameters * (config.val_refresh_interval > 1)  # the validation gradient
    to_come = math.ceil((config.max_steps - done) / config.checkpoint_interval)
    there = 0
    if start is not None:
        before = checkpoint.list_checkpoints(start.parent)
        there = sum(checkpoint.step_of(each) <= done for each in before)
    # An old one is removed after the new one is whole.
    at_a_time = min(to_come, max(1, config.keep_checkpoints + 1 - there))
    rows = (config.max_steps - done) * global_batch_size(config, world)
    layers = sum(next(module.parameters(recurse=False), None) is not None for module in model.modules())
    parts = parts_per_sample(config.score_granularity, config.val_batch_size, layers, config.block_size)
    parts += (config.values == "exact") + config.exact_by_target * config.block_size
    scores = rows * (SCORE_BYTES + 8 * parts) if config.computes_scores else 0
    return Space(one if to_come else 0, one * at_a_time + scores)


def global_batch_size(config: "TrainingConfig", world: World) -> int:
    """Return the number of samples in one optimizer step."""
    return world.size * config.gradient_accumulation_steps * config.batch_size


def checkpoint_facts(config: "TrainingConfig", world: World, data: "TrainingData") -> dict[str, object]:
    """Return what must be the same when a run resumes, besides its settings."""
    return {
        "global batch (processes x --batch_size x --gradient_accumulation_steps)": global_batch_size(
            config, world
        ),
        "SHA-256 of the shards": {name: part.checksums for name, part in data.blocks.items()},
        "all domains of the training split": data.blocks[
            "train"
        ].all_domains,  # sample ids count through them
        "SHA-256 of the validation rows": hash_of_rows(data.validation),
    }
