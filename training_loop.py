"""Trainer: the schedule and the step."""

import logging
import math
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from config_file import TrainingConfig
from dataloader import Batch
from distributed import World
from finite_guard import FiniteGuard, NonFiniteLoss
from ghostEngines.engine_manager import GhostEngineManager
from interrupts import interrupt_deferred
from model_setup import CausalLM, Precision
from run_log import RunLog
from training_data import TrainingData

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
    """Trains the model on its data, with whatever the manager's method adds to a step."""

    def __init__(
        self,
        config: TrainingConfig,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        manager: GhostEngineManager,
        data: TrainingData,
        log: RunLog,
        world: World,
    ) -> None:
        self.config, self.model, self.optimizer, self.manager = config, model, optimizer, manager
        self.data, self.log = data, log
        self.precision = Precision.of(config)
        self.scaler = self.precision.grad_scaler()
        self.guard = FiniteGuard(self.precision.device, self.scaler.is_enabled())
        self.global_batch_size = config.batch_size * world.size
        self.progress = Progress()

    def run(self) -> None:
        """All steps. However it ends, the scores so far are on the disk; unless by an error, so is the model.

        Raises NonFiniteLoss, and whatever happens in a step; KeyboardInterrupt after Ctrl-C.
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
                self._save(with_model=between_steps)

    def _save(self, with_model: bool) -> None:
        try:
            self.manager.close()
        finally:
            if with_model:
                save_model(self.model, self.config)

    def _train(self) -> None:
        config = self.config
        for step in range(config.max_steps):
            self._step(step)
            if self._evaluates_after(step):
                with interrupt_deferred() as interruptible, self.manager.detached(), interruptible():
                    self.progress.evaluation = evaluate(self.model, self.data, config, self.precision)
                self.log.evaluation(step, self.progress.evaluation)
                check_evaluation(self.progress.evaluation)

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

        batch = self.data.train.batch(step)
        x, y = to_device(batch, self.precision.device)
        manager.attach_train_batch(
            x, y, sample_ids=batch.sample_ids, domains=batch.domains, blocks=batch.blocks
        )
        x, y = manager.prepare_forward_input()  # (n+m, T)
        with self.precision.autocast():
            losses = self.model(x, y)  # (n+m,)
        self.scaler.scale(manager.joint_loss(losses)).backward()
        manager.prepare_gradients()

        with interrupt_deferred():
            norm, clip_factor = self._clip(losses)
            skipped = self.guard.record(step, batch, losses, norm)
            if self._waits(step):
                self.guard.check()
            if not self.scaler.is_enabled():  # as a gradient scaler tells fused optimizers to do nothing
                self.optimizer.found_inf = skipped.float()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            manager.aggregate_and_log(
                losses=losses,
                step=step,
                lr=lr,
                clip_factor=clip_factor,
                skipped=skipped,
                global_batch_size=self.global_batch_size,
            )
            self.progress.train_loss = manager.train_losses(losses).mean()
            self._record(step, batch, lr, norm, clip_factor, start)

    def _clip(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Unscales the gradients and shortens them to --grad_clip. Returns their norm () before it and the
        factor ()."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.guard.spoil(gradients[0], losses, self.manager.dot_products())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if self.config.grad_clip == 0:
            return norm, torch.ones_like(norm)
        factor = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        return norm, factor

    def _record(
        self,
        step: int,
        batch: Batch,
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
                **dot_statistics(self.manager.dot_products(), batch.domains),
            }
        progress.steps = step + 1
        progress.tokens += self.global_batch_size * self.config.block_size
        progress.seconds += time.perf_counter() - start
        if values is not None:
            tokens = progress.tokens - progress.tokens_logged
            seconds = progress.seconds - progress.seconds_logged
            self.log.record(step, values | {"tokens_per_second": tokens / seconds})
            progress.tokens_logged, progress.seconds_logged = progress.tokens, progress.seconds
        self.log.advance(f"loss {progress.loss_shown:.4f}, {progress.tokens / progress.seconds:.0f} tokens/s")


def check_evaluation(losses: dict[str, float]) -> None:
    """NonFiniteLoss unless all losses are finite."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss on {name} is {loss}: the parameters are of no use; see metrics.jsonl"
            )


def dot_statistics(dots: Tensor | None, domains: tuple[str, ...]) -> dict[str, float]:
    """Mean, extremes and per-domain means of a step's dot products, for the log."""
    if dots is None:
        return {}
    values = dots.double().tolist()
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
    model: CausalLM, data: TrainingData, config: TrainingConfig, precision: Precision
) -> dict[str, float]:
    """Mean loss in nats per token on train, val and test: --eval_iter batches of --eval_bs rows, the same
    ones every time."""
    result = {}
    for name, loader in data.evaluation.items():
        losses = []
        for index in range(config.eval_iter):
            x, y = to_device(loader.batch(index), precision.device)
            with precision.autocast():
                losses.append(model(x, y))
        result[name] = torch.cat(losses).mean().item()
    return result


def save_model(model: CausalLM, config: TrainingConfig) -> None:
    """{result_dir}/model in Hugging Face format; it is there whole, or not at all."""
    folder = config.result_dir / "model"
    unfinished = config.result_dir / ".model.tmp"
    model.hf.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    logger.info("model saved to %s", folder)
