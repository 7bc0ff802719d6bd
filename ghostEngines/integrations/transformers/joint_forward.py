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
from ...graph import ACCUMULATE, graph_nodes
from ...losses import IGNORE_INDEX, require
from .batches import CausalBatches
from .losses import Batch
from .outputs import compare, fused_output

# Arguments of a model that belong to no row.
SWITCHES = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")
OTHER_LOSS = (
    "the loss that compute_loss() of the Trainer's class returns is not the mean over the targets alone: it has "
    "another term, or other weights, and scores would not be of it."
)


@dataclass(frozen=True)
class Loss:
    """How a Trainer makes the loss of a batch: the sum over its targets, divided by `items` and times `factor`."""

    items: Any  # targets of the update, over all processes; None: those of the batch
    factor: float

    def weight(self, counts: Tensor) -> Tensor:
        """Return the weight of each target (scalar), given each row's number of targets (n,)."""
        items = counts.sum() if self.items is None else torch.as_tensor(self.items, device=counts.device)
        return self.factor / items.double().clamp(min=1)  # an update may have no target at all


class JointForward:
    """Called in the model's place, it runs the model on the joint batch and returns the outputs of the train rows.

    So a Trainer's own `compute_loss` makes its metrics and its loss of the train rows alone. What is differentiated is
    the engine's joint loss. The two are compared in every step, their values and what they depend on.
    """

    def __init__(
        self,
        model: nn.Module,
        manager: GradDotProdManager,
        batches: CausalBatches,
        loss: Loss,
        attach: Callable[[Batch, Tensor], None],
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        labels: Tensor | None,
        tolerance: float | None,
    ) -> None:
        """Prepare one micro-batch.

        Args:
            model: what the loop calls, such as a DDP wrapper.
            attach: tells the manager of the batch's train rows and their weights (n,).
            autocast: of the training pass. The engine must see it, and accelerate's own begins inside the model.
            labels: of the batch, if compute_loss takes them out before it calls the model.
            tolerance: compare the losses with the loss that the model itself returns for the train rows, relative to
                that. None: do not compare.
        """
        self._model, self._manager, self._batches, self._loss = model, manager, batches, loss
        self._attach, self._autocast, self._labels, self._tolerance = attach, autocast, labels, tolerance
        self.losses: Tensor | None = None  # (N,) of the joint batch
        self._counts: Tensor  # (n,) targets of the train rows
        self._log_probs: Tensor | None = None  # of a fused output, from which compute_loss makes the loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        """Return the train rows' outputs.

        Raises:
            UserError: a second call in one step; a batch without labels, or with other samples than the dataset's rows;
                a model whose loss is not the mean cross entropy of the next tokens.
        """
        if self.losses is not None:
            raise UserError(
                "compute_loss() calls the model twice in a step: which loss is trained on is unknown"
            )
        own_labels = {} if {"labels", "shift_labels"} & inputs.keys() else {"labels": self._labels}
        if "labels" in own_labels and self._labels is None:
            raise UserError("the batch has no labels, so that its rows have no loss")
        switches = {key: inputs[key] for key in SWITCHES if key in inputs}
        fused, items = inputs.get("fused_lm_head", False), inputs.get("num_items_in_batch")
        apart = {*switches, "fused_lm_head", "num_items_in_batch"}
        train = {key: value for key, value in (inputs | own_labels).items() if key not in apart}
        reference = None if self._tolerance is None or own_labels else self._reference(inputs)
        self._counts = self._batches.counts(train)
        self._attach(train, self._counts * self._loss.weight(self._counts))
        joint = self._manager.prepare_forward_input()
        with self._autocast():
            logits = self._model(**self._batches.inputs(joint), **switches).logits
        joint_losses = self._batches.row_losses(logits, joint)
        self.losses = joint_losses.mean
        own = joint_losses.part(*train["input_ids"].shape)
        loss = own.mean_over(items)
        if reference is not None:
            assert self._tolerance is not None
            compare(loss, reference, self._tolerance)
        if fused:
            output = fused_output(own)
            self._targets, self._log_probs = own.targets[:, :-1], output.log_probs
            return output
        # With gradients, so that a term of the logits in the loss is seen.
        return CausalLMOutput(loss=loss, logits=own.logits.requires_grad_())

    def _reference(self, inputs: Batch) -> Tensor:
        with self._manager.plain(), torch.no_grad():
            loss: Tensor = self._model(**inputs).loss
        return loss

    def differentiable(self, loss: Tensor) -> Tensor:
        """Return the Trainer's loss with the gradient of the joint loss.

        Args:
            loss: what the Trainer's compute_loss made of the outputs.

        Raises:
            UserError: it did not call the model, or has a term besides.
            ValueError: it is not the weighted sum of the rows' losses.
        """
        if self.losses is None:
            raise UserError("compute_loss() did not call the model that it was given")
        weight = self._loss.weight(self._counts)
        if loss.requires_grad:
            self._check_terms(loss, weight)
        loss = loss.detach()
        expected = (self._counts * weight * self.losses.detach()[: len(self._counts)]).sum()
        error = (loss - expected).abs() - 1e-3 * expected.abs()
        require(~(error > 1e-6), OTHER_LOSS)  # a loss that is not finite is the Trainer's business
        joint = self._manager.joint_loss(self.losses)
        return joint + (loss - joint.detach())

    def _check_terms(self, loss: Tensor, weight: Tensor) -> None:
        """Check that the loss depends on nothing but the log-probabilities of a fused output, as it should."""
        of = [node.variable for node in graph_nodes(loss) if node.name() == ACCUMULATE]  # type: ignore[attr-defined]
        if self._log_probs is None or any(each is not self._log_probs for each in of):
            raise UserError(
                OTHER_LOSS.replace(
                    "is not the mean over the targets: it has", "is not only the mean over targets: it has"
                )
            )
        (gradient,) = torch.autograd.grad(loss, self._log_probs)
        same = torch.isclose(gradient, -weight.to(gradient), rtol=1e-3, atol=0)
        require((same | (self._targets == IGNORE_INDEX)).all(), OTHER_LOSS)
