"""Trainer: the schedule and the step."""

import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import checkpoint
from config_file import TrainingConfig
from dataloader import Batch
from distributed import World
from finite_guard import FiniteGuard, NonFiniteLoss
from ghostEngines.engine_manager import GhostEngineManager
from interrupts import Interrupted, StopSignals, interrupt_deferred
from model_setup import CausalLM, Precision, gradient_sync
from run_log import RunLog
from training_data import TrainingData
from validation_rows import hash_of_rows

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a run has to show at any moment. tokens, seconds: of training alone. train_loss (): of the last
    step, on the device; loss_shown: as of the last look at it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    loss_shown: float = math.nan
    tokens_logged: int = 0  # tokens and seconds at the last record
    seconds_logged: float = 0.0
    evaluation: dict[str, float] | None = None
    evaluation_due: bool = False  # after the last step, and not made yet


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up over warmup_step steps, then a cosine from learning_rate to min_lr at lr_decay_steps."""
    assert config.min_lr is not None and config.lr_decay_steps is not None
    if step < config.warmup_step:
        return config.learning_rate * (step + 1) / (config.warmup_step + 1)
    if step >= config.lr_decay_steps:
        return config.min_lr
    progress = (step - config.warmup_step) / (config.lr_decay_steps - config.warmup_step)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Trains the model on its data, with whatever the manager's method adds to a step.

    parallel: what is called in the model's place (model_setup.parallelise). stop: the signals that have come,
    where several processes must agree on when to stop. checkpoints: writes one after so many steps."""

    def __init__(
        self,
        config: TrainingConfig,
        model: CausalLM,
        parallel: nn.Module,
        optimizer: torch.optim.Optimizer,
        manager: GhostEngineManager,
        data: TrainingData,
        log: RunLog,
        world: World,
        stop: StopSignals,
    ) -> None:
        self.config, self.model, self.parallel, self.optimizer = config, model, parallel, optimizer
        self.manager, self.data, self.log, self.world, self.stop = manager, data, log, world, stop
        self.precision = Precision.of(config)
        self.scaler = self.precision.grad_scaler()
        self.guard = FiniteGuard(self.precision.device, world, self.scaler.is_enabled())
        self.global_batch_size = global_batch_size(config, world)
        self.progress = Progress()
        self.saved_at: int | None = None  # the step of the newest checkpoint of this process

    def run(self) -> None:
        """All steps that are left. However it ends, the scores so far are on the disk; unless by an error, so
        is a checkpoint.

        Raises NonFiniteLoss, and whatever happens in a step; KeyboardInterrupt after Ctrl-C and other signals
        to stop.
        """
        between_steps = False  # after another error the parameters may be anything
        try:
            self._train()
            between_steps = True
        except KeyboardInterrupt:
            between_steps = True
            raise
        except NonFiniteLoss as error:
            between_steps = True
            if error.step is not None:
                self.progress.steps = error.step  # those after it changed nothing
            raise
        finally:
            with interrupt_deferred():
                self._close(with_checkpoint=between_steps)

    def _close(self, with_checkpoint: bool) -> None:
        try:
            self.manager.close()
        finally:
            if with_checkpoint and self.saved_at != self.progress.steps:
                self._write_checkpoint()

    def _train(self) -> None:
        config, progress = self.config, self.progress
        if progress.evaluation_due:  # the run was stopped before or in it
            self._evaluate(progress.steps - 1)
        for step in range(progress.steps, config.max_steps):
            self._step(step)
            self._stop_if_told()
            if self._evaluates_after(step):
                self._evaluate(step)
            if (step + 1) % config.checkpoint_interval == 0 or step + 1 == config.max_steps:
                with interrupt_deferred():
                    self.manager.merge()
                    self._write_checkpoint()

    def _stop_if_told(self) -> None:
        """Interrupted in all processes once a signal has come to one of them."""
        if self.world.size > 1 and (number := self.world.largest(self.stop.received or 0)):
            raise Interrupted(number)

    def _evaluate(self, step: int) -> None:
        progress = self.progress
        with interrupt_deferred() as interruptible, self.manager.detached(), interruptible():
            progress.evaluation = evaluate(
                self.model, self.data, self.config, self.precision, self.world, self._stop_if_told
            )
        progress.evaluation_due = False
        self.log.evaluation(step, progress.evaluation)
        check_evaluation(progress.evaluation)

    def _write_checkpoint(self) -> None:
        """All scores before it are on the disk of every process by then."""
        self.world.wait()
        save_checkpoint(self)
        self.saved_at = self.progress.steps
        self.world.wait()

    def _evaluates_after(self, step: int) -> bool:
        return (step + 1) % self.config.eval_interval == 0 or step + 1 == self.config.max_steps

    def _logs(self, step: int) -> bool:
        return (step + 1) % self.config.log_interval == 0

    def _waits(self, step: int) -> bool:
        """Whether this step reads what is on the device, which on a GPU means waiting for it."""
        return self.precision.device.type == "cpu" or self._logs(step) or self._evaluates_after(step)

    def _step(self, step: int) -> None:
        start, manager = time.perf_counter(), self.manager
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        manager.begin_step()
        batches, losses, train_losses = [], [], []
        for micro_batch in range(self.config.gradient_accumulation_steps):
            batch = self.data.train.batch(step, micro_batch)
            last = micro_batch + 1 == self.config.gradient_accumulation_steps
            with gradient_sync(self.parallel, last):
                micro_losses = self._forward_backward(batch)
            batches.append(batch)
            losses.append(micro_losses)
            train_losses.append(manager.train_losses(micro_losses))

        with interrupt_deferred():
            norm, clip_factor, skipped = self._clip(step, batches, torch.cat(losses))
            if self._waits(step):
                self.guard.check()
            if not self.scaler.is_enabled():  # as a gradient scaler tells fused optimizers to do nothing
                self.optimizer.found_inf = skipped.float()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            manager.aggregate_and_log(
                step=step,
                lr=lr,
                clip_factor=clip_factor,
                skipped=skipped,
                global_batch_size=self.global_batch_size,
            )
            self.progress.train_loss = torch.cat(train_losses).mean()
            self._record(step, batches, lr, norm, clip_factor, start)

    def _forward_backward(self, batch: Batch) -> Tensor:
        """One micro-batch. Returns the losses of its rows, without gradient."""
        manager = self.manager
        x, y = to_device(batch, self.precision.device)
        manager.attach_train_batch(
            x, y, sample_ids=batch.sample_ids, domains=batch.domains, blocks=batch.blocks
        )
        x, y = manager.prepare_forward_input()  # (n+m, T)
        with self.precision.autocast():
            losses = self.parallel(x, y)  # (n+m,)
        self.scaler.scale(manager.joint_loss(losses)).backward()
        manager.prepare_gradients(losses)
        return losses.detach()

    def _clip(self, step: int, batches: list[Batch], losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unscales the gradients and shortens them to --grad_clip. Returns their norm () before it, the
        factor (), and whether the step must be left out ()."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        of_losses = self.guard.spoil(gradients[0], losses, self.manager.dot_products())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):  # of a model that is divided among processes
            norm = norm.full_tensor()
        skipped = self.guard.record(step, batches, losses, of_losses, norm)
        if self.config.grad_clip == 0:
            return norm, torch.ones_like(norm), skipped
        factor = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        return norm, factor, skipped

    def _record(
        self,
        step: int,
        batches: list[Batch],
        lr: float,
        norm: Tensor,
        clip_factor: Tensor,
        start: float,
    ) -> None:
        progress, values = self.progress, None
        if self._waits(step):
            progress.loss_shown = self.world.sum(progress.train_loss).item() / self.world.size
        if self._logs(step):
            values = {
                "train_loss": progress.loss_shown,
                "lr": lr,
                "grad_norm": norm.item(),
                "clip_factor": clip_factor.item(),
                **self._dot_statistics(batches),
            }
        progress.steps, progress.evaluation_due = step + 1, self._evaluates_after(step)
        progress.tokens += self.global_batch_size * self.config.block_size
        progress.seconds += time.perf_counter() - start
        if values is not None:
            tokens = progress.tokens - progress.tokens_logged
            seconds = progress.seconds - progress.seconds_logged
            self.log.record(step, values | {"tokens_per_second": tokens / seconds})
            progress.tokens_logged, progress.seconds_logged = progress.tokens, progress.seconds
        self.log.advance(f"loss {progress.loss_shown:.4f}, {progress.tokens / progress.seconds:.0f} tokens/s")

    def _dot_statistics(self, batches: list[Batch]) -> dict[str, float]:
        dots = self.manager.dot_products()
        if dots is None:
            return {}
        domains = [domain for batch in batches for domain in batch.domains]
        of_all = self.world.gather((dots.double().tolist(), domains))
        values = [value for values, _ in of_all for value in values]
        return dot_statistics(values, [domain for _, domains in of_all for domain in domains])


def global_batch_size(config: TrainingConfig, world: World) -> int:
    """Samples in one optimizer step."""
    return world.size * config.gradient_accumulation_steps * config.batch_size


def check_evaluation(losses: dict[str, float]) -> None:
    """NonFiniteLoss unless all losses are finite."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss on {name} is {loss}: the parameters are of no use; see metrics.jsonl"
            )


def dot_statistics(values: list[float], domains: list[str]) -> dict[str, float]:
    """Mean, extremes and per-domain means of a step's dot products, for the log."""
    by_domain: dict[str, list[float]] = defaultdict(list)
    for domain, value in zip(domains, values, strict=True):
        by_domain[domain].append(value)
    statistics = {
        "dot_product/mean": sum(values) / len(values),
        "dot_product/min": min(values),
        "dot_product/max": max(values),
    }
    return statistics | {
        f"dot_product/domain/{name}": sum(each) / len(each) for name, each in sorted(by_domain.items())
    }


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, y (n, T), copied without waiting where they are in pinned memory."""
    return batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: CausalLM,
    data: TrainingData,
    config: TrainingConfig,
    precision: Precision,
    world: World,
    between: Callable[[], None],
) -> dict[str, float]:
    """Mean loss in nats per token on train, val and test: --eval_iter batches of --eval_bs rows, the same
    ones every time, divided among the processes. between: called before each batch."""
    result = {}
    for name, loader in data.evaluation.items():
        total = torch.zeros(2, dtype=torch.float64, device=precision.device)  # sum of losses, rows
        for first in range(0, config.eval_iter, world.size):
            between()
            index = first + world.rank
            counts = index < config.eval_iter
            # a process without a batch of its own repeats the last: the parts of a model that is divided
            # among processes come together in every forward pass
            x, y = to_device(loader.batch(min(index, config.eval_iter - 1)), precision.device)
            with precision.autocast():
                losses = model(x, y)
            if counts:
                total += torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
        losses_sum, rows = world.sum(total).tolist()
        result[name] = losses_sum / rows
    if isinstance(model, FSDPModule):
        model.reshard()  # its outermost group waits for a backward pass that does not come
    return result


def checkpoint_facts(config: TrainingConfig, world: World, data: TrainingData) -> dict[str, object]:
    """What must be the same when a run is resumed, besides its settings."""
    return {
        "global batch (processes x --batch_size x --gradient_accumulation_steps)": global_batch_size(
            config, world
        ),
        "SHA-256 of the training shards": data.blocks["train"].checksums,
        "SHA-256 of the validation rows": hash_of_rows(data.validation),
    }


def save_checkpoint(trainer: Trainer) -> None:
    """The state of the run after the step that was last recorded. Called by all processes; rank 0 writes."""
    config, world, progress = trainer.config, trainer.world, trainer.progress
    sharded = isinstance(trainer.parallel, FSDPModule)
    weights = checkpoint.model_state(trainer.model.hf, sharded=sharded) if sharded else None
    state = {
        "optimizer": checkpoint.optimizer_state(trainer.model, trainer.optimizer, sharded=sharded),
        "scaler": trainer.scaler.state_dict(),
        "random": checkpoint.random_state(),
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation_due": progress.evaluation_due,
        "evaluation": progress.evaluation,
    }

    def write(folder: Path) -> None:
        trainer.model.hf.save_pretrained(folder, state_dict=weights)
        torch.save(state, folder / checkpoint.TRAINER_STATE)
        shutil.copy(config.result_dir / "config.json", folder / checkpoint.RUN_CONFIG)

    if world.rank == 0:
        facts = checkpoint_facts(config, world, trainer.data)
        checkpoint.publish(
            config.result_dir / "checkpoints", progress.steps, write, facts, config.keep_checkpoints
        )


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Everything but the weights, which the model was made with. Called by all processes."""
    state = torch.load(folder / checkpoint.TRAINER_STATE, map_location="cpu", weights_only=True)
    sharded = isinstance(trainer.parallel, FSDPModule)
    checkpoint.load_optimizer_state(trainer.model, trainer.optimizer, state["optimizer"], sharded=sharded)
    trainer.scaler.load_state_dict(state["scaler"])
    checkpoint.set_random_state(state["random"])
    progress = trainer.progress
    progress.steps = trainer.saved_at = checkpoint.step_of(folder)
    progress.tokens = progress.tokens_logged = state["tokens"]
    progress.seconds = progress.seconds_logged = state["seconds"]
    progress.evaluation_due, progress.evaluation = state["evaluation_due"], state["evaluation"]
