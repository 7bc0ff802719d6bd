"""GhostEngineManager: the calls that a training loop makes, the same for every method.

manager.attach_train_batch(x, y, sample_ids=ids, domains=domains, blocks=blocks)
losses = model(*manager.prepare_forward_input())
manager.joint_loss(losses).backward()
manager.prepare_gradients()               # .grad is the training gradient
...                                       # clip, optimizer.step()
manager.aggregate_and_log(step=step, lr=lr, clip_factor=factor, ...)

With several micro-batches the first four calls are made for each of them, and `.grad` is the training
gradient after the last.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from foundation.granularity import Granularity, total_of
from score_store.writer import ScoreWriter

from .backward_checks import LossScale
from .graddotprod_engine import GradDotProdEngine
from .passes import Direction


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
    training.

    micro_batches: how many make one optimizer step."""

    rows: TrainRows
    val_loss: Tensor | None = None  # mean loss of the validation rows before the step, where a method has any

    def __init__(self, micro_batches: int = 1) -> None:
        self.micro_batches = micro_batches

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
        return losses.mean() / self.micro_batches

    def prepare_gradients(self, losses: Tensor) -> None:
        """After it (with the last micro-batch) `.grad` is the gradient of the train rows' mean loss. losses:
        the model's."""

    def train_losses(self, losses: Tensor) -> Tensor:
        """(n,): the train rows' own losses, without gradient: what is logged as training loss."""
        return losses[: len(self.rows.x)].detach()

    def dot_products(self) -> Tensor | None:
        """(n·G,): the dot products of the step's micro-batches so far; None for a method that computes none,
        and for a step that has none."""
        return None

    def aggregate_and_log(
        self,
        *,
        step: int,
        lr: float,
        clip_factor: Tensor,
        skipped: Tensor,
        global_batch_size: int,
    ) -> None:
        """Records the step's scores. clip_factor (): by what clipping multiplied the gradient; skipped ():
        whether the optimizer left the step out; global_batch_size: train rows over all processes and
        micro-batches."""

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The model without an engine, for evaluation."""
        yield

    def begin_step(self) -> None:
        """Forgets micro-batches of a step that was not finished."""

    def flush(self) -> None:
        """Everything recorded so far goes to the disk."""

    def merge(self) -> None:
        """The same, in few files."""

    def close(self) -> None:
        """Flushes, and leaves the model as it was."""


class GradDotProdManager(GhostEngineManager):
    """Method GradDotProd: every train row's gradient dot product with the validation gradient, written to
    `scores`.

    val_x, val_y (m, T): the validation rows, the same in every step, on the model's device. granularity,
    direction, strategy, loss_scale and guard: see GradDotProdEngine and its attach. save_interval: steps
    between two writes to the disk. Raises what `GradDotProdEngine.attach` raises."""

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
        direction: Direction = "gradient",
        strategy: str | None = None,
        micro_batches: int = 1,
        loss_scale: LossScale | None = None,
        guard: bool = True,
    ) -> None:
        super().__init__(micro_batches)
        self._loss_scale = loss_scale
        self._recorded: list[tuple[TrainRows, Tensor, Tensor]] = []  # rows, dot products, train losses
        self._optimizer = optimizer
        self._val_x, self._val_y = val_x, val_y
        self._scores, self._save_interval = scores, save_interval
        self._engine = GradDotProdEngine(
            model,
            len(val_x),
            granularity=granularity,
            direction=direction,
            strategy=strategy,
            micro_batches=micro_batches,
            guard=guard,
        )
        self._engine.attach(optimizer, loss_scale=loss_scale)

    def prepare_forward_input(self) -> tuple[Tensor, Tensor]:
        if self._recorded:  # the validation rows go with the first micro-batch
            return self.rows.x, self.rows.y
        return torch.cat([self.rows.x, self._val_x]), torch.cat([self.rows.y, self._val_y])

    def joint_loss(self, losses: Tensor) -> Tensor:
        return self._engine.joint_loss(losses)

    def prepare_gradients(self, losses: Tensor) -> None:
        self._engine.prepare_gradients()
        if not self._recorded:
            self.val_loss = losses[len(self.rows.x) :].detach().mean()
        self._recorded.append((self.rows, self._engine.dot_products(), self.train_losses(losses)))

    def begin_step(self) -> None:
        self._recorded.clear()
        self._engine.forget_micro_batches()

    def dot_products(self) -> Tensor | None:
        if not self._engine.scored:
            return None
        dots = torch.cat([scores for _, scores, _ in self._recorded])
        total: Tensor = total_of(dots, self._engine.granularity)
        return total

    def aggregate_and_log(
        self,
        *,
        step: int,
        lr: float,
        clip_factor: Tensor,
        skipped: Tensor,
        global_batch_size: int,
    ) -> None:
        assert self.val_loss is not None
        for rows, dots, train_losses in self._recorded:
            self._scores.append(
                step=step,
                sample_ids=rows.sample_ids,
                domains=rows.domains,
                blocks=rows.blocks,
                dot_products=dots,
                train_losses=train_losses,
                val_loss=self.val_loss,
                lr=lr,
                clip_factor=clip_factor,
                global_batch_size=global_batch_size,
                null=skipped if self._engine.scored else True,
            )
        if (step + 1) % self._save_interval == 0:
            self.flush()

    @contextmanager
    def detached(self) -> Iterator[None]:
        self._engine.detach()
        try:
            yield
        finally:
            self._engine.attach(self._optimizer, loss_scale=self._loss_scale)

    def flush(self) -> None:
        self._scores.flush()

    def merge(self) -> None:
        self._scores.flush()
        self._scores.merge()

    def close(self) -> None:
        try:
            self._engine.detach()
        finally:
            self._scores.close()
