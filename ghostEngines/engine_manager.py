"""GhostEngineManager: the calls that a training loop makes, the same for every method.

manager.attach_train_batch(x, y, sample_ids=ids, domains=domains, blocks=blocks)
losses = model(*manager.prepare_forward_input())
manager.joint_loss(losses).backward()
manager.prepare_gradients()               # .grad is the training gradient
...                                       # clip, optimizer.step()
manager.aggregate_and_log(step=step, lr=lr, clip_factor=factor, global_batch_size=n)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .contraction import Strategy
from .graddotprod_engine import GradDotProdEngine
from .metrics_log import ScoreWriter
from .step import Granularity


@dataclass(frozen=True)
class TrainRows:
    """The n train rows of a step: x, y (n, T) token ids, and of each row its permanent id, domain and
    block."""

    x: Tensor
    y: Tensor
    sample_ids: npt.NDArray[np.int64]
    domains: Sequence[str]
    blocks: npt.NDArray[np.int64]


class GhostEngineManager:
    """Method Regular: no engine. All calls are there, so that a loop needs no `if method`, and add nothing to
    training."""

    rows: TrainRows

    def attach_train_batch(
        self,
        x: Tensor,
        y: Tensor,
        *,
        sample_ids: npt.NDArray[np.int64],
        domains: Sequence[str],
        blocks: npt.NDArray[np.int64],
    ) -> None:
        """The train rows of the coming step: x, y (n, T) on the model's device, the others of length n."""
        self.rows = TrainRows(x, y, sample_ids, domains, blocks)

    def prepare_forward_input(self) -> tuple[Tensor, Tensor]:
        """(x, y) for the model: the train rows (n, T), followed by the validation rows where the method has
        any."""
        return self.rows.x, self.rows.y

    def joint_loss(self, losses: Tensor) -> Tensor:
        """What to call backward() on, from the model's per-sample losses."""
        return losses.mean()

    def prepare_gradients(self) -> None:
        """After it `.grad` is the gradient of the train rows' mean loss."""

    def train_losses(self, losses: Tensor) -> Tensor:
        """(n,): the train rows' own losses, without gradient: what is logged as training loss."""
        return losses[: len(self.rows.x)].detach()

    def dot_products(self) -> Tensor | None:
        """(n,): the dot products of the step, None for a method that computes none."""
        return None

    def aggregate_and_log(
        self,
        *,
        losses: Tensor,
        step: int,
        lr: float,
        clip_factor: Tensor,
        skipped: Tensor,
        global_batch_size: int,
    ) -> None:
        """Records the step's scores. losses: the model's; clip_factor (): by what clipping multiplied the
        gradient; skipped (): whether the optimizer left the step out; global_batch_size: train rows over all
        processes."""

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The model without an engine, for evaluation."""
        yield

    def flush(self) -> None:
        """Everything recorded so far goes to the disk."""

    def close(self) -> None:
        """Flushes, and leaves the model as it was."""


class GradDotProdManager(GhostEngineManager):
    """Method GradDotProd: every train row's gradient dot product with the validation gradient, written to
    `scores`.

    val_x, val_y (m, T): the validation rows, the same in every step, on the model's device. granularity and
    strategy: see GradDotProdEngine. save_interval: steps between two writes to the disk. Raises what
    `GradDotProdEngine.attach` raises."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        val_x: Tensor,
        val_y: Tensor,
        scores: ScoreWriter,
        save_interval: int,
        granularity: Granularity = "total",
        strategy: Strategy | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._val_x, self._val_y = val_x, val_y
        self._scores, self._save_interval = scores, save_interval
        self._engine = GradDotProdEngine(model, len(val_x), granularity=granularity, strategy=strategy)
        self._engine.attach(optimizer)

    def prepare_forward_input(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.rows.x, self._val_x]), torch.cat([self.rows.y, self._val_y])

    def joint_loss(self, losses: Tensor) -> Tensor:
        return self._engine.joint_loss(losses)

    def prepare_gradients(self) -> None:
        self._engine.prepare_gradients()

    def dot_products(self) -> Tensor:
        dots = self._engine.dot_products()
        if self._engine.granularity == "total":
            return dots
        return dots.mean(1) if self._engine.granularity == "pairwise" else dots.sum(1)

    def aggregate_and_log(
        self,
        *,
        losses: Tensor,
        step: int,
        lr: float,
        clip_factor: Tensor,
        skipped: Tensor,
        global_batch_size: int,
    ) -> None:
        self._scores.append(
            step=step,
            sample_ids=self.rows.sample_ids,
            domains=self.rows.domains,
            blocks=self.rows.blocks,
            dot_products=self._engine.dot_products(),
            train_losses=self.train_losses(losses),
            lr=lr,
            clip_factor=clip_factor,
            global_batch_size=global_batch_size,
            null=skipped,
        )
        if (step + 1) % self._save_interval == 0:
            self.flush()

    @contextmanager
    def detached(self) -> Iterator[None]:
        self._engine.detach()
        try:
            yield
        finally:
            self._engine.attach(self._optimizer)

    def flush(self) -> None:
        self._scores.flush()

    def close(self) -> None:
        try:
            self._engine.detach()
        finally:
            self._scores.close()
