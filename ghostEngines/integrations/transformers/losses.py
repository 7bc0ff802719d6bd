"""The losses of the rows of a Hugging Face batch, and their weights in the loss of a Trainer."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from foundation.errors import UserError

from ...losses import IGNORE_INDEX, losses_of, next_tokens
from ...row_maps import Indexed

Batch = dict[str, Any]


def targets_of(batch: Batch) -> Tensor:
    """Return the target of each position (R, T), -100 for none: the label of the next one."""
    shifted: Tensor | None = batch.get("shift_labels")
    return next_tokens(batch["labels"]) if shifted is None else shifted


@dataclass(frozen=True)
class RowLosses:
    """What the rows of a batch lose, or the samples in them."""

    mean: Tensor  # (N,) over each one's own targets, 0 without any; in `losses_by_target` its parts (N, T)
    targets: Tensor  # (R, T), -100 for none
    of_positions: Tensor  # (R, T) cross entropies, without gradient; 0 where there is no target
    logits: Tensor  # (R, T, V), without gradient

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, samples: Tensor | None) -> Self:
        """Compute them. A Trainer admits rows without a target, as a prompt that fills its row: they weigh nothing.

        Args:
            logits, targets: (R, T, V) and (R, T).
            samples: (R, T), the sample of each position; None: the rows are the samples.

        Raises:
            UserError: logits of another shape.
        """
        if logits.dim() != 3 or logits.shape[:2] != targets.shape:
            raise UserError(
                f"the model returns logits {tuple(logits.shape)} for labels {tuple(targets.shape)}: scored() is for "
                "causal language models, with logits (rows, positions, vocabulary) for each position of the input"
            )
        flat = logits.reshape(-1, logits.shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        losses = nn.functional.cross_entropy(
            flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view(targets.shape)
        by_sample = losses
        if samples is not None:
            by_sample = Indexed(samples, int(samples.max()) + 1).to_rows(losses)
        counts = count(targets, samples).clamp(min=1)
        return cls(losses_of(by_sample, counts), targets, losses.detach(), logits.detach())

    def part(self, rows: int, positions: int) -> "RowLosses":
        """Return the first rows and positions of a batch, as before other rows were joined to it."""
        part = slice(rows), slice(positions)
        return replace(
            self, targets=self.targets[part], of_positions=self.of_positions[part], logits=self.logits[part]
        )

    def mean_over(self, items: Any) -> Tensor:
        """Return the sum over all targets, divided by a number of them; None: their own (scalar)."""
        if items is None:
            items = (self.targets != IGNORE_INDEX).sum().clamp(min=1)
        mean: Tensor = self.of_positions.sum() / items
        return mean


def count(targets: Tensor, samples: Tensor | None) -> Tensor:
    """Return the number of targets of each row, or of each sample in them (N,)."""
    counted = targets != IGNORE_INDEX
    if samples is None:
        return counted.sum(1)
    return torch.bincount(samples.flatten(), counted.flatten(), int(samples.max()) + 1).round().long()
