"""Trainer: the schedule and the step."""

import logging
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config_file import TrainingConfig
from data_processing.blocks import Batch
from evaluation import check_evaluation, evaluate
from ghostEngines.engine_manager import GhostEngineManager
from model_setup import Precision, gradient_sync
from run.ending import NON_FINITE, OK, stopped_by
from run.finite_guard import FiniteGuard, NonFiniteLoss
from run.log import SilentLog
from run.method import Training
from run.signals import Interrupted, StopSignals, drop_closed_outputs, interrupt_deferred
from run.state import TrainingState, checkpoint_facts, global_batch_size

logger = logging.getLogger(__name__)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step.

    It warms up linearly over warmup_step steps, then follows a cosine from learning_rate to min_lr at lr_decay_steps.
    """
    assert config.min_lr is not None and config.lr_decay_steps is not None
    if step < config.warmup_step:
        return config.learning_rate * (step + 1) / (config.warmup_step + 1)
    if step >= config.lr_decay_steps:
        return config.min_lr
    progress = (step - config.warmup_step) / (config.lr_decay_steps - config.warmup_step)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together (scalar), gathered where the model is divided among processes."""
    norm: Tensor = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip(gradients: list[Tensor], norm: Tensor, largest: float) -> Tensor:
    """Scale the gradients in place to a norm of at most `largest` and return the factor (scalar).

    norm: theirs (scalar). largest: 0 for no clipping."""
    if largest == 0:
        return torch.ones_like(norm)
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return factor


class Trainer:
    """Train a model on its data, with what the manager's method adds to a step.

    Args:
        parallel: what is called in the model's place (model_setup.parallelise).
        stop: the signals that arrived, where several processes must agree on when to stop.
    """

    def __init__(
        self,
        training: Training,
        parallel: nn.Module,
        manager: GhostEngineManager,
        log: SilentLog,
        stop: StopSignals,
    ) -> None:
        self.config, self.world, self.start = training.config, training.world, training.start
        self.model, self.optimizer, self.data = training.model, training.optimizer, training.data
        self.parallel, self.manager, self.log, self.stop = parallel, manager, log, stop
        self.precision = Precision.of(self.config)
        self.scaler = training.scaler
        self.guard = FiniteGuard(self.precision.device, self.world, self.scaler.is_enabled())
        self.global_batch_size = global_batch_size(self.config, self.world)
        self.state = TrainingState(self.model, parallel, self.optimizer, self.scaler, manager)
        self.progress = self.state.progress
        self.saved_at: int | None = None  # how many steps the newest checkpoint has

    def resume(self, checkpoint: Path) -> None:
        """Load the state of a checkpoint; the model has its weights already."""
        self.state.load(checkpoint)
        self.saved_at = self.progress.steps

    def train(self) -> int:
        """Train to the end, from a checkpoint or from the beginning, and return the exit status; log how a run
        ended early."""
        if self.start is not None:
            self.resume(self.start)
        try:
            self.run()
        except KeyboardInterrupt as error:
            drop_closed_outputs()
            logger.warning(
                "interrupted after step %d: scores and a checkpoint are saved; --resume --run_name %s resumes it",
                self.progress.steps,
                self.config.run_name,
            )
            return stopped_by(error)
        except NonFiniteLoss as error:
            logger.error("main.py: error: %s", error)
            return NON_FINITE
        return OK

    def run(self) -> None:
        """Make all steps that are left.

        However it ends, the scores so far are on the disk; unless it ends by an error, so is a checkpoint.

        Raises:
            NonFiniteLoss: a loss or gradient is not finite.
            KeyboardInterrupt: after Ctrl-C and other signals to stop.
        """
        good = False  # after an error the parameters may be anything
        try:
            try:
                self._train()
            except KeyboardInterrupt:
                self.guard.check()  # steps that nobody has looked at yet
                good = True
                raise
            good = True
        except NonFiniteLoss as error:
            if error.step is not None:  # those after it changed nothing
                self.progress.steps, good = error.step, True
            raise
        finally:
            with interrupt_deferred():
                self._close(with_checkpoint=good)

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
            if self._saves_after(step):
                with interrupt_deferred():
                    self.manager.merge()
                    self._write_checkpoint()

    def _stop_if_told(self) -> None:
        """Raise Interrupted in all processes once a signal has come to one of them."""
        if self.world.size > 1 and (number := self.world.largest(self.stop.received or 0)):
            raise Interrupted(number)

    def _evaluate(self, step: int) -> None:
        progress = self.progress
        with interrupt_deferred() as interruptible, self.manager.detached(), interruptible():
            progress.evaluation = evaluate(
                self.model, self.data, self.config, self.precision, self.world, self._stop_if_told
            )
        with interrupt_deferred():
            progress.evaluation_due = False
            self.log.evaluation(step, progress.evaluation)
        check_evaluation(progress.evaluation)

    def _write_checkpoint(self) -> None:
        """Write a checkpoint, once all scores before it are on the disk of every process."""
        self.log.sync()
        self.world.wait()
        self.state.save(self.config, self.world, checkpoint_facts(self.config, self.world, self.data))
        self.saved_at = self.progress.steps
        self.world.wait()

    def _evaluates_after(self, step: int) -> bool:
        return (step + 1) % self.config.eval_interval == 0 or step + 1 == self.config.max_steps

    def _saves_after(self, step: int) -> bool:
        return (step + 1) % self.config.checkpoint_interval == 0 or step + 1 == self.config.max_steps

    def _logs(self, step: int) -> bool:
        return (step + 1) % self.config.log_interval == 0

    def _waits(self, step: int) -> bool:
        """Return whether this step reads values from the device, which on a GPU is a device sync."""
        must = self._logs(step) or self._evaluates_after(step) or self._saves_after(step)
        must = must or self.manager.waits(step)
        return must or self.precision.device.type == "cpu"

    def _step(self, step: int) -> None:
        start, manager = time.perf_counter(), self.manager
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        manager.begin_step(step)
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
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            all_losses = torch.cat(losses)
            signals = self.guard.spoil(gradients[0], all_losses, manager.dot_products())
            self.scaler.unscale_(self.optimizer)
            norm = total_norm(gradients)
            skipped = self.guard.record(step, batches, all_losses, signals, norm)
            clip_factor = clip(gradients, norm, self.config.grad_clip)
            if self._waits(step):
                self.guard.check()
            if not self.scaler.is_enabled():  # how a gradient scaler makes fused optimizers skip a step
                self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            manager.aggregate_and_log(
                step=step,
                lr=lr,
                clip_factor=clip_factor,
                skipped=skipped,
                global_batch_size=self.global_batch_size,
            )
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            train_loss = self.world.sum(torch.cat(train_losses).mean())
            self.progress.train_loss = train_loss / self.world.size
            self._record(step, batches, lr, norm, clip_factor, start)

    def _forward_backward(self, batch: Batch) -> Tensor:
        """Run one micro-batch forward and backward, and return the losses of its rows, without gradient."""
        manager = self.manager
        inputs = batch.to(self.precision.device)
        manager.attach_train_batch(
            inputs, sample_ids=batch.sample_ids, domains=batch.domains, blocks=batch.blocks
        )
        inputs = manager.prepare_forward_input()  # (n+m, ...) each
        with self.precision.autocast():
            losses: Tensor = self.parallel(*inputs)  # (n+m,)
        self.scaler.scale(manager.joint_loss(losses)).backward()
        manager.prepare_gradients(losses)
        return losses.detach()

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
            progress.loss_shown = progress.train_loss.item()
        if self._logs(step):
            values = {
                "train_loss": progress.loss_shown,
                "lr": lr,
                "grad_norm": norm.item(),
                "clip_factor": clip_factor.item(),
                **self._dot_statistics(batches, lr * clip_factor.item()),
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

    def _dot_statistics(self, batches: list[Batch], factor: float) -> dict[str, float]:
        """Return the step's statistics of dot products and of the validation rows' loss.

        Args:
            factor: of the gradient in the update, learning rate times clip factor.
        """
        statistics = {}
        if self.manager.val_loss is not None:
            statistics["validation_rows/loss"] = self.manager.val_loss.item()
        if (dots := self.manager.dot_products()) is None:
            return statistics
        domains = [domain for batch in batches for domain in batch.domains]
        of_all = self.world.gather((dots.double().tolist(), domains))
        values = [value for values, _ in of_all for value in values]
        statistics["validation_rows/predicted_fall"] = factor * sum(values) / self.global_batch_size
        return statistics | dot_statistics(values, [domain for _, domains in of_all for domain in domains])


def dot_statistics(values: list[float], domains: list[str]) -> dict[str, float]:
    """Return mean, extremes and per-domain means of a step's dot products, for the log."""
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
