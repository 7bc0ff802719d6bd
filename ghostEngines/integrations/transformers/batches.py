"""Batches of a Hugging Face Trainer: dictionaries of tensors, with one sample a row or several packed into one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foundation.errors import UserError

from ...row_maps import packed_documents
from .losses import Batch, RowLosses, count, targets_of

FILL = {"labels": -100, "shift_labels": -100, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0}
OF_A_PACKED_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What TRL's collator derives from the lengths of the documents in a row."""


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Let the model run during the block without the autocast that accelerate puts into its forward."""
    if "_original_forward" not in vars(model):
        yield
        return
    wrapped, model.forward = model.forward, vars(model)["_original_forward"]
    try:
        yield
    finally:
        model.forward = wrapped


class CausalBatches:
    """Batches of a causal language model whose samples are rows.

    Joined batches are padded on the right, where a causal model's other positions do not see it: so a train row's loss
    is what it would have been without the validation rows, on whichever side the collator pads.

    Args:
        model: without wrappers, for the engine's own passes.
        pad_token: the id that fills `input_ids`.
    """

    find_samples: Callable[..., Tensor] | None = None  # the engine's option `samples`

    def __init__(self, model: nn.Module, pad_token: int) -> None:
        self.model, self._fill = model, FILL | {"input_ids": pad_token}

    def rows(self, batch: Batch) -> int:
        return len(batch["input_ids"])

    def joined(self, train: Batch, validation: Batch) -> Batch:
        """Return the joint batch. Raises UserError for inputs that it does not know how to join."""
        joint = {}
        for key in _same_keys(train, validation):
            pair = [train[key], validation[key]]
            if not all(isinstance(each, Tensor) and each.dim() > 0 for each in pair):
                raise UserError(
                    f"the batch has {key!r}, a {type(train[key]).__name__}: it is not known how to join it with "
                    "that of the validation rows"
                )
            if key in self._fill:
                length = max(each.shape[1] for each in pair)
                pair = [
                    nn.functional.pad(each, (0, length - each.shape[1]), value=self._fill[key])
                    for each in pair
                ]
            elif pair[0].shape[1:] != pair[1].shape[1:]:
                raise UserError(
                    f"the batch has {key!r} of shape {tuple(pair[0].shape)}, and that of the validation rows has shape "
                    f"{tuple(pair[1].shape)}: it is not known how to pad it. Known are {', '.join(self._fill)}"
                )
            joint[key] = torch.cat(pair)
        return joint

    def first(self, batch: Batch, rows: int) -> Batch:
        return {key: value[:rows] for key, value in batch.items()}

    def samples(self, batch: Batch) -> Tensor | None:
        """Return the sample of each position (R, T); None: the rows are the samples."""
        return None

    def inputs(self, batch: Batch) -> Batch:
        """Return what the model is called with, for logits alone."""
        return {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}

    def row_losses(self, logits: Tensor, batch: Batch) -> RowLosses:
        """Return the losses of a batch's samples, given the model's logits (R, T, V)."""
        return RowLosses.of(logits, targets_of(batch).to(logits.device), self.samples(batch))

    def counts(self, batch: Batch) -> Tensor:
        """Return the number of targets of each sample (N,)."""
        return count(targets_of(batch), self.samples(batch))

    def losses(self, batch: Batch) -> Tensor:
        with without_wrappers(self.model):
            return self.row_losses(self.model(**self.inputs(batch), use_cache=False).logits, batch).mean


class PackedBatches(CausalBatches):
    """Batches of one row, in which documents stand one after the other; `position_ids` restart with each of them."""

    find_samples = staticmethod(packed_documents)

    def rows(self, batch: Batch) -> int:
        return int((batch["position_ids"] == 0).sum())

    def samples(self, batch: Batch) -> Tensor:
        return packed_documents(batch["position_ids"])

    def joined(self, train: Batch, validation: Batch) -> Batch:
        keys = [key for key in _same_keys(train, validation) if key not in OF_A_PACKED_ROW]
        if any(len(each["input_ids"]) != 1 for each in (train, validation)):
            raise UserError(
                "a batch of several rows with position_ids and without attention_mask: give a mask"
            )
        if unknown := [key for key in keys if key not in self._fill]:
            raise UserError(f"the packed batch has {', '.join(unknown)}: it is not known how to join them")
        return self._complete({key: torch.cat([train[key], validation[key]], dim=1) for key in keys}, train)

    def first(self, batch: Batch, rows: int) -> Batch:
        inside = int((self.samples(batch) < rows).sum())
        some = {key: value[:, :inside] for key, value in batch.items() if key not in OF_A_PACKED_ROW}
        return self._complete(some, batch)

    def _complete(self, batch: Batch, like: Batch) -> Batch:
        """Return a batch with what is derived of the documents' lengths, if another one has it."""
        if not set(OF_A_PACKED_ROW) & like.keys():
            return batch
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()
        ends = torch.cat([starts, starts.new_tensor([batch["position_ids"].shape[1]])])
        longest, ends = int(ends.diff().max()), ends.to(torch.int32)
        derived = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": self.samples(batch).to(torch.int32),
        }
        return batch | {key: derived[key] for key in OF_A_PACKED_ROW if key in like}


def _same_keys(train: Batch, validation: Batch) -> list[str]:
    if train.keys() != validation.keys():
        raise UserError(
            f"a train batch has {', '.join(sorted(train))}, and that of the validation rows "
            f"{', '.join(sorted(validation))}: `score_against` must be a dataset of the same form as train_dataset"
        )
    return list(train)
