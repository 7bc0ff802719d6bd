"""Trainer: the schedule and the step."""

import logging
import math
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config_file import TrainingConfig
from dataloader import Batch
from distributed import World
from ghostEngines.engine_manager import GhostEngineManager
from interrupts import interrupt_deferred
from model_setup import CausalLM, Precision
from run_log import RunLog
from training_data import TrainingData

logger = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; the parameters are those before that step."""


@dataclass
class Progress:
    """What a run has to show at any moment. seconds: of training alone."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
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
        except (KeyboardInterrupt, NonFiniteLoss):
            between_steps = True
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
            if (step + 1) % config.eval_interval == 0 or step + 1 == config.max_steps:
                with interrupt_deferred() as interruptible, self.manager.detached(), interruptible():
                    self.progress.evaluation = evaluate(self.model, self.data, config, self.precision)
                self.log.evaluation(step, self.progress.evaluation)
                check_evaluation(self.progress.evaluation)

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
        train_loss = manager.train_losses(losses).mean().item()
        if not losses.isfinite().all():
            raise non_finite(step, batch, f"the loss is {train_loss} (per row: {losses.tolist()})")
        self.scaler.scale(manager.joint_loss(losses)).backward()
        manager.prepare_gradients()

        with interrupt_deferred():
            norm, clip_factor = self._clip()
            if not (norm.isfinite() or self.scaler.is_enabled()):  # the scaler leaves such a step out
                raise non_finite(step, batch, f"the norm of the gradient is {norm.item()}")
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            manager.aggregate_and_log(
                losses=losses,
                step=step,
                lr=lr,
                clip_factor=clip_factor,
                skipped=~norm.isfinite(),
                global_batch_size=self.global_batch_size,
            )
            self._record(step, batch, lr, train_loss, norm, clip_factor, start)

    def _clip(self) -> tuple[Tensor, Tensor]:
        """Unscales the gradients and shortens them to --grad_clip. Returns their norm () before it and the
        factor ()."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        dots = self.manager.dot_products()
        if dots is not None:
            # A NaN if one of them is not finite: validation rows may overflow where train rows do not, and
            # the scaler must lower its scale for them, too.
            gradients[0].add_(dots.sum() * 0)
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
        train_loss: float,
        norm: Tensor,
        clip_factor: Tensor,
        start: float,
    ) -> None:
        values = None
        if (step + 1) % self.config.log_interval == 0:
            values = {
                "train_loss": train_loss,
                "lr": lr,
                "grad_norm": norm.item(),  # waits for the device: the step's time is known after that
                "clip_factor": clip_factor.item(),
                **dot_statistics(self.manager.dot_products(), batch.domains),
            }
        progress, seconds = self.progress, time.perf_counter() - start
        tokens = self.global_batch_size * self.config.block_size
        progress.steps, progress.train_loss = step + 1, train_loss
        progress.tokens, progress.seconds = progress.tokens + tokens, progress.seconds + seconds
        if values is not None:
            self.log.record(step, values | {"tokens_per_second": tokens / seconds})
        self.log.advance(f"loss {train_loss:.4f}, {progress.tokens / progress.seconds:.0f} tokens/s")


def check_evaluation(losses: dict[str, float]) -> None:
    """NonFiniteLoss unless all losses are finite."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss on {name} is {loss}: the parameters are of no use; see metrics.jsonl"
            )


def non_finite(step: int, batch: Batch, seen: str) -> NonFiniteLoss:
    """The error that stops a run at this step."""
    return NonFiniteLoss(
        f"step {step}: {seen}; samples {batch.sample_ids.tolist()} of {', '.join(batch.domains)}. The run "
        "stops with the parameters before this step: lower --learning_rate, lengthen --warmup_step, or look "
        "at these samples"
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
    """x, y (n, T), copied without waiting where the device allows it."""
    if device.type == "cpu":
        return batch.x, batch.y
    return tuple(part.pin_memory().to(device, non_blocking=True) for part in (batch.x, batch.y))


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
