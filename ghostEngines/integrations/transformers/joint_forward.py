"""The model as a Trainer's loss function sees it, while the engine makes a joint pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from foundation.errors import UserError

from ...engine_manager import GradDotProdManager
from ...losses import require
from .batches import CausalBatches
from .losses import Batch
from .outputs import compare, fused_output

# Arguments of a model that belong to no row.
SWITCHES = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class Loss:
    """How a Trainer makes the loss of a batch: the sum over its targets, divided by `items` and times `factor`."""

    items: Any  # targets of the update, over all processes; None: those of the batch
    factor: float

    def weights(self, counts: Tensor) -> Tensor:
        """Return the weights of the rows' mean losses, given each row's number of targets (n,)."""
        wide = counts.double()
        items = wide.sum().clamp(min=1) if self.items is None else torch.as_tensor(self.items).to(wide)
        return wide * (self.factor / items)


class JointForward:
    """Called in the model's place, it runs the model on the joint batch and returns the outputs of the train rows.

    So a Trainer's own `compute_loss` makes its metrics and its loss of the train rows alone. What is differentiated is
    the engine's joint loss; the two are compared in every step.
    """

    def __init__(
        self,
        model: nn.Module,
        manager: GradDotProdManager,
        batches: CausalBatches,
        loss: Loss,
        attach: Callable[[Batch, Tensor], None],
        autocast: Callable[[], AbstractContextManager[Any]],
        check: bool,
    ) -> None:
        """Prepare one micro-batch.

        Args:
            model: what the loop calls, such as a DDP wrapper.
            attach: tells the manager of the batch's train rows and their weights (n,).
            autocast: of the training pass. The engine must see it, and accelerate's own begins inside the model.
            check: compare the losses with the loss that the model itself returns for the train rows.
        """
        self._model, self._manager, self._batches, self._loss = model, manager, batches, loss
        self._attach, self._autocast, self._check = attach, autocast, check
        self.losses: Tensor | None = None  # (N,) of the joint batch
        self._weights: Tensor  # (n,) of the train rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        """Return the train rows' outputs, without gradient.

        Raises:
            UserError: a second call in one step; a batch without labels, or with other samples than the dataset's rows;
                a model whose loss is not the mean cross entropy of the next tokens.
        """
        if self.losses is not None:
            raise UserError(
                "compute_loss() calls the model twice in a step: which loss is trained on is unknown"
            )
        if not {"labels", "shift_labels"} & inputs.keys():
            raise UserError("the batch has no labels, so that its rows have no loss")
        switches = {key: inputs[key] for key in SWITCHES if key in inputs}
        fused, items = inputs.get("fused_lm_head", False), inputs.get("num_items_in_batch")
        apart = {*switches, "fused_lm_head", "num_items_in_batch"}
        train = {key: value for key, value in inputs.items() if key not in apart}
        reference = self._reference(inputs) if self._check else None
        self._weights = self._loss.weights(self._batches.counts(train))
        self._attach(train, self._weights)
        joint = self._manager.prepare_forward_input()
        with self._autocast():
            logits = self._model(**self._batches.inputs(joint), **switches).logits
        joint_losses = self._batches.row_losses(logits, joint)
        self.losses = joint_losses.mean
        own = joint_losses.part(*train["input_ids"].shape)
        loss = own.mean_over(items)
        if reference is not None:
            compare(loss, reference)
        return fused_output(own) if fused else CausalLMOutput(loss=loss, logits=own.logits)

    def _reference(self, inputs: Batch) -> Tensor:
        with self._manager.plain(), torch.no_grad():
            loss: Tensor = self._model(**inputs).loss
        return loss

    def differentiable(self, loss: Tensor) -> Tensor:
        """Return the Trainer's loss with the gradient of the joint loss.

        Args:
            loss: what the Trainer's compute_loss made of the outputs.

        Raises:
            UserError: it did not call the model.
            ValueError: it is not the weighted sum of the rows' losses.
        """
        if self.losses is None:
            raise UserError("compute_loss() did not call the model that it was given")
        expected = (self._weights * self.losses.detach()[: len(self._weights)]).sum()
        # An update without targets in this process has a loss of zero.
        error = (loss - expected).abs() - 1e-3 * expected.abs()
        require(
            ~(error > 1e-6),  # a loss that is not finite is the Trainer's business
            "the loss that compute_loss() of the Trainer's class returns is not the mean over the targets: it has "
            "another term, or other weights, and scores would not be of it.",
        )
        joint = self._manager.joint_loss(self.losses)
        return joint + (loss - joint.detach())
