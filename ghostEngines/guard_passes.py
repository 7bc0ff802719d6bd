"""The guard's own passes: backward passes from the losses of some rows alone, before the step's own.

Usually they use the graph of the step's forward pass. The fused head makes its gradients in its forward pass,
so it must know beforehand which rows count: then each of the guard's passes has a forward pass of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .bypass import find_bypass, raise_bypassed
from .graph import Graph
from .guard import Guard, check_random, random_states
from .joins import hook_joins
from .layer_rules import CrossEntropyHead
from .passes import CurrentPass, Pass
from .tapped import TappedLayer


def has_fused_head(layers: Sequence[TappedLayer]) -> bool:
    """Return True if one of the layers makes its gradients in its forward pass."""
    return any(isinstance(each.layer, CrossEntropyHead) for each in layers)


def check_on_step(guard: Guard, current: CurrentPass, weighted: Tensor) -> None:
    """Run the guard's backward passes on the graph of the step.

    Args:
        weighted: the losses times their weights in the joint loss, (n+m,).

    Raises:
        RowsError: rows that depend on each other.
    """
    for mask in guard.masks:
        _backward(guard, current, mask, (weighted * mask).sum(), retain_graph=True)
    guard.check_rows()


def check_by_rehearsal(
    guard: Guard,
    current: CurrentPass,
    layers: Sequence[TappedLayer],
    new_pass: Callable[[], Pass],
    forward: Callable[[], object],
) -> None:
    """Run a forward and a backward pass for each of the guard's halves of the rows.

    Args:
        new_pass: makes a pass over the step's batch and sets it as the current one.
        forward: calls the model on the step's batch.

    Raises:
        RowsError: rows that depend on each other, or random numbers in the forward pass.
        RuntimeError: a weight that is used without calling its layer.
    """
    for mask in guard.masks:
        pass_ = new_pass()
        guard.weights = torch.where(mask, pass_.row_weights(), 0.0)
        guard.rehearsing, guard.losses = True, []
        states = random_states(mask.device)
        try:
            forward()
        finally:
            guard.rehearsing = False
            pass_.end_forward()
        check_random(states, mask.device)
        loss = guard.head_loss()
        if not loss.requires_grad:  # the head is the only layer that trains
            continue
        pass_.bypassed = find_bypass(loss, pass_.probes, layers)
        raise_bypassed(pass_.bypassed)
        if pass_.free:
            pass_.joins = hook_joins(Graph(loss), pass_.free, pass_.samples)
        _backward(guard, current, mask, loss, retain_graph=False)
        pass_.remove_joins()
    guard.check_rows()


def _backward(guard: Guard, current: CurrentPass, mask: Tensor, loss: Tensor, *, retain_graph: bool) -> None:
    """Differentiate the loss of the rows in the mask (n+m,), with nothing written to `.grad`."""
    assert current.pass_ is not None
    pass_, current.phase = current.pass_, "backward"
    guard.begin(mask)
    try:
        loss = loss * guard.scale
        torch.autograd.grad(loss, pass_.probes, retain_graph=retain_graph, allow_unused=True)
    finally:
        guard.end()
        current.phase = "idle"
