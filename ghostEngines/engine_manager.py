"""GhostEngineManager: the calls that a training loop makes, the same for every method.

    manager.attach_train_batch((x, y), sample_ids=ids, domains=domains, blocks=blocks)
    losses = model(*manager.prepare_forward_input())
    manager.joint_loss(losses).backward()
    manager.prepare_gradients(losses)         # .grad is the training gradient
    ...                                       # clip
    manager.aggregate_and_log(step=step, lr=lr, clip_factor=factor, ...)
    ...                                       # optimizer.step()

With several micro-batches the loop makes the first four calls for each of them. After the last one `.grad` is
the training gradient. `begin_step(step)` comes before the first one. Batches are tuples of tensors, or whatever else
the loop has an object for that knows what to do with them (batches.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from foundation.granularity import total_of
from score_store.writer import ExactRows, ScoredStep

from .backward_checks import LossScale
from .batches import Batches, TensorBatches
from .graddotprod_engine import GradDotProdEngine
from .scoring import Scoring


class Scores(Protocol):
    """Where a manager writes: a ScoreWriter, or what puts more beside the scores."""

    def append(
        self,
        of_step: ScoredStep,
        *,
        sample_ids: npt.ArrayLike,
        domains: Sequence[str],
        blocks: npt.ArrayLike,
        dot_products: Tensor,
        train_losses: Tensor,
        row_weights: Tensor | npt.ArrayLike | None = None,
        exact: ExactRows | None = None,
    ) -> None: ...

    def flush(self) -> None: ...

    def merge(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrainRows:
    """The n train rows of a pass."""

    inputs: Any  # a batch
    sample_ids: npt.NDArray[np.int64]  # (n,) permanent
    domains: Sequence[str]
    blocks: npt.NDArray[np.int64]  # (n,)
    weights: Tensor | None = (
        None  # (n,) of their losses in this process's loss; None: all of the update weigh the same
    )


class GhostEngineManager:
    """Method Regular: its calls add nothing to training, so that a loop needs no `if method`."""

    rows: TrainRows
    val_loss: Tensor | None = None  # mean over the validation rows before the step; None: not known

    def __init__(self, micro_batches: int = 1) -> None:
        self.micro_batches = micro_batches  # G: how many make one optimizer step

    def attach_train_batch(
        self,
        inputs: Any,
        *,
        sample_ids: npt.NDArray[np.int64],
        domains: Sequence[str],
        blocks: npt.NDArray[np.int64],
        weights: Tensor | None = None,
    ) -> None:
        """Set the train rows of the next pass.

        Args:
            inputs: a batch on the model's device, such as token ids and targets (n, T).
            weights: (n,) of the rows' losses in this process's loss, as in `GradDotProdEngine.joint_loss`; None: the
                loss is the mean over the update.
        """
        self.rows = TrainRows(inputs, sample_ids, domains, blocks, weights)

    def prepare_forward_input(self) -> Any:
        """Return the batch to call the model on: the n train rows, and m validation rows if the method needs them."""
        return self.rows.inputs

    def joint_loss(self, losses: Tensor) -> Tensor:
        """Return the loss to call backward() on, given the model's per-sample losses."""
        if self.rows.weights is not None:
            return (losses * self.rows.weights).sum()
        return losses.mean() / self.micro_batches

    def prepare_gradients(self, losses: Tensor) -> None:
        """Check the backward pass. After the last micro-batch `.grad` is the training gradient.

        Args:
            losses: the model's, per sample.
        """

    def train_losses(self, losses: Tensor) -> Tensor:
        """Return the train rows' losses (n,) without gradient, for the log."""
        return losses[: len(self.rows.sample_ids)].detach()

    def dot_products(self) -> Tensor | None:
        """Return the dot products of the step's micro-batches so far, (n·G,).

        Returns:
            None if the method computes none, or the step has none.
        """
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
        """Record the step's scores, before the optimizer's step: exact values are of what that is going to do.

        Args:
            lr: the largest learning rate of the optimizer's groups.
            clip_factor: (scalar), by which clipping multiplied the gradient.
            skipped: (scalar), True if the optimizer skipped the step.
            global_batch_size: train rows over all processes and micro-batches.
        """

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Detach the engine while the block runs, for an evaluation."""
        yield

    def plain(self) -> AbstractContextManager[None]:
        """Return a context in which the model runs as without an engine."""
        return nullcontext()

    def begin_step(self, step: int, micro_batches: int | None = None) -> None:
        """Prepare a step, with the learning rate set; forget the micro-batches of one that was not finished.

        Args:
            micro_batches: how many this step has; None: as many as the manager was made with.
        """

    def waits(self, step: int) -> bool:
        """Return whether the step reads values from the device."""
        return False

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must have, for the steps to come to be the same."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from the state of a checkpoint."""

    def flush(self) -> None:
        """Write everything recorded so far to the disk."""

    def merge(self) -> None:
        """Write everything recorded so far to the disk, in few files."""

    def close(self) -> None:
        """Write everything recorded so far to the disk, and leave the model as it was."""


class GradDotProdManager(GhostEngineManager):
    """Method GradDotProd: compute every train row's dot product and write it to `scores`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        validation: Any,
        scores: Scores,
        scoring: Scoring,
        batches: Batches | None = None,
        processes: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        micro_batches: int = 1,
        loss_scale: LossScale | None = None,
        **options: Any,
    ) -> None:
        """Attach an engine to the model.

        Args:
            validation: every step's validation rows, a batch on the model's device.
            batches: what to do with batches; None: they are tuples of tensors (N, ...), what the model is called with.
            processes: over which gradients are averaged, so that a row's weight in the update is that in the loss of
                its process, divided by their number.
            autocast: the context of the passes that the manager makes itself.
            micro_batches: G.
            loss_scale: of GradDotProdEngine.attach.
            options: the other options of GradDotProdEngine.

        Raises:
            AttachError: the engine cannot score this model with these options.
        """
        super().__init__(micro_batches)
        self._loss_scale = loss_scale
        self._recorded: list[tuple[TrainRows, Tensor, Tensor]] = []  # rows, dot products, train losses
        self._model, self._optimizer, self._autocast = model, optimizer, autocast
        self._batches = TensorBatches(model) if batches is None else batches
        self._validation, self._processes = validation, processes
        self._scores, self._scoring = scores, scoring
        self._gradient: dict[str, Tensor] | None = None  # the validation gradient, if it is from its own pass
        m = self._batches.rows(validation)
        self._engine = GradDotProdEngine(model, m, micro_batches=micro_batches, **options)
        self._engine.attach(optimizer, loss_scale=loss_scale)

    def prepare_forward_input(self) -> Any:
        if self.rows.weights is not None:
            self._engine.begin_pass(self.rows.weights)
        if self._scoring.own_passes or self._recorded:  # the validation rows go with the first micro-batch
            return self.rows.inputs
        return self._batches.joined(self.rows.inputs, self._validation)

    def joint_loss(self, losses: Tensor) -> Tensor:
        return self._engine.joint_loss(losses)

    def prepare_gradients(self, losses: Tensor) -> None:
        self._engine.prepare_gradients()
        if not self._recorded and not self._scoring.own_passes:
            self.val_loss = losses[len(self.rows.sample_ids) :].detach().mean()
        self._recorded.append((self.rows, self._engine.dot_products(), self.train_losses(losses)))

    def begin_step(self, step: int, micro_batches: int | None = None) -> None:
        self._recorded.clear()
        self._engine.forget_micro_batches()
        if micro_batches is not None:
            self._engine.begin_update(micro_batches)
        if not self._scoring.own_passes:
            return
        self.val_loss = None
        if self._gradient is None or step % self._scoring.refresh_interval == 0:
            self._gradient = None  # its memory is needed
            self._engine.use_direction(None)
            self._gradient, loss = self._engine.validation_gradient(
                self._autocast_losses, lookahead=self._scoring.lookahead
            )
            if not self._scoring.lookahead:
                self.val_loss = loss
        self._engine.use_direction(self._gradient)

    def _autocast_losses(self) -> Tensor:
        with self._autocast():
            return self._batches.losses(self._validation)

    def waits(self, step: int) -> bool:
        return self._scoring.exact(step)

    def state(self) -> dict[str, Tensor]:
        kept = self._gradient if self._scoring.refresh_interval > 1 else None
        return {} if kept is None else dict(kept)

    def load_state(self, state: dict[str, Tensor]) -> None:
        parameters = dict(self._model.named_parameters())
        self._gradient = {name: value.to(parameters[name].device) for name, value in state.items()} or None

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
        self._check_lr(lr)
        exact: list[ExactRows | None] = [None] * len(self._recorded)
        if self._scoring.exact(step) and not skipped:
            exact = [*self._exact_rows(step, clip_factor.item(), global_batch_size)]
        of_step = ScoredStep(
            step=step,
            lr=lr,
            clip_factor=clip_factor,
            val_loss=self.val_loss,
            global_batch_size=global_batch_size,
            null=skipped if self._engine.scored else True,
        )
        for (rows, dots, train_losses), of_rows in zip(self._recorded, exact, strict=True):
            self._scores.append(
                of_step,
                sample_ids=rows.sample_ids,
                domains=rows.domains,
                blocks=rows.blocks,
                dot_products=dots,
                train_losses=train_losses,
                row_weights=None if rows.weights is None else rows.weights.double() / self._processes,
                exact=of_rows,
            )
        if (step + 1) % self._scoring.save_interval == 0:
            self.flush()

    def _check_lr(self, lr: float) -> None:
        """Raise ValueError unless values can be computed with this learning rate."""
        auto = self._engine.direction == "auto"
        rates = {
            float(group["lr"])
            for group in self._optimizer.param_groups
            if auto or any(parameter.requires_grad for parameter in group["params"])
        }
        if not math.isclose(lr, max(rates), rel_tol=1e-6):
            raise ValueError(
                f"aggregate_and_log() got lr={lr}, and dot products are relative to the largest learning rate of the "
                f"optimizer's groups, {max(rates)}: give that one, and set it before begin_step()"
            )
        if not auto and len(rates) > 1:
            raise ValueError(
                f"the optimizer's groups have the learning rates {', '.join(map(str, sorted(rates)))}: values of "
                'direction "gradient" are of one; use "auto", which knows each parameter\'s'
            )

    def _exact_rows(self, step: int, clip_factor: float, global_rows: int) -> Iterator[ExactRows]:
        """Yield the exact values of each micro-batch's rows."""
        micros = [micro for micro, _, _ in self._recorded]
        sizes = [len(micro.sample_ids) for micro in micros]
        some = [self._scoring.exact_rows(step, rows) for rows in sizes]
        weights = [
            micro.weights[:first] / self._processes
            for micro, first in zip(micros, some, strict=True)
            if micro.weights is not None
        ]
        batches = [
            self._batches.first(micro.inputs, first) for micro, first in zip(micros, some, strict=True)
        ]
        found = self._engine.exact_values(
            [partial(self._batches.losses, batch) for batch in batches],
            partial(self._batches.losses, self._validation),
            clip_factor=clip_factor,
            global_rows=None if weights else global_rows,
            row_weights=weights or None,
            whole_batch=some == sizes,
            by_target=self._scoring.by_target,
        )
        of_step = (found.of_batch, found.momentum, found.decay, found.measured, found.cosine)
        parts: Sequence[Tensor | None] = found.by_target or [None] * len(sizes)
        for values, rows, of_values in zip(found.values, sizes, parts, strict=True):
            padded = nn.functional.pad(values, (0, rows - len(values)), value=torch.nan)
            yield ExactRows(padded, *of_step, by_target=of_values)

    @contextmanager
    def detached(self) -> Iterator[None]:
        self._engine.detach()
        try:
            yield
        finally:
            self._engine.attach(self._optimizer, loss_scale=self._loss_scale)

    def plain(self) -> AbstractContextManager[None]:
        return self._engine.paused()

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
