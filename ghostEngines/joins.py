"""Outputs without a sample dimension: position embeddings, tables of relative positions, parameters that are
added to or multiplied with all rows.

The gradient that arrives at such an output is a sum over the samples. The gradients of single samples are still
apart one node later in the graph: at the join, the first operation whose result has the sample dimension, because
its other input has it, or because it expands. A hook on the join takes the gradient of its result, and the
operation's own backward, given one sample's part of that, gives the sample's part of the output's gradient.
"""

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import consumers_of
from .tap import Call

DIRECT = ("AddBackward0", "ExpandBackward0")  # operations that hand their gradient on as it is


class Join:
    """One join of an output: path leads from the join down to the output, operations without samples.

    path: pairs of an operation and which of its inputs is meant; the first is the join.
    """

    def __init__(self, call: Call, path: list[tuple[Node, int]], rows: int, shape: torch.Size) -> None:
        self.call, self.path, self.rows, self.shape = call, path, rows, shape
        self._handle = path[0][0].register_prehook(self.hook)

    def remove(self) -> None:
        """Let go of the graph."""
        self._handle.remove()
        self.path = []

    def hook(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Take the gradient of the join's result, (N, ...), and note the output's for each sample."""
        (gradient,) = gradients
        if gradient is None:
            return
        if self.call.guard is not None and self.call.guard.watches_rows(self.call, gradient):
            return
        each = self._direct(gradient) if len(self.path) == 1 else None
        if each is None:
            each = torch.stack([self._of_sample(gradient, i) for i in range(self.rows)])
        assert self.call.row_gradients is not None
        self.call.row_gradients.append(each)

    def _direct(self, gradient: Tensor) -> Tensor | None:
        """(N, *shape) where the join hands on its gradient: rows of it, summed to the output's shape."""
        node, _ = self.path[0]
        if node.name() not in DIRECT or getattr(node, "_saved_alpha", 1) != 1:
            return None
        one = (1, *gradient.shape[1:])
        lacking = len(one) - len(self.shape)
        if lacking < 0 or tuple(self.shape[max(0, 1 - lacking) :]) != one[max(1, lacking) :]:
            return None
        return gradient.reshape(self.rows, *self.shape) if lacking <= 1 else None

    def _of_sample(self, gradient: Tensor, i: int) -> Tensor:
        """The output's gradient for one sample, by the backward of each operation on the path."""
        part = torch.zeros_like(gradient)
        part[i] = gradient[i]
        with torch.no_grad():
            for node, number in self.path:
                results = node(part)
                part = results[number] if isinstance(results, tuple) else results
                child, output = node.next_functions[number]
                part = part.sum_to_size(child._input_metadata[output].shape)  # autograd does so between nodes
        return part


def hook_joins(loss: Tensor, free: list[tuple[Call, Node]], rows: int) -> list[Join]:
    """Find the joins of all outputs without a sample dimension, and put hooks on them. They must be removed at the
    end of the step: they hold the graph that holds them.

    Raises:
        RuntimeError: an output that the loss depends on without a join: the model sums over it, gives it to
            another covered layer, or to compiled code.
    """
    consumers, found = consumers_of(loss), []
    for call, node in free:
        call.row_gradients = []
        if (node, 0) not in consumers:
            continue  # the loss does not depend on it
        shape = torch.Size(node._input_metadata[0].shape)  # of the output
        for path in _paths(node, 0, consumers, rows, call):
            found.append(Join(call, path, rows, shape))
    free.clear()  # it holds the graph
    return found


def _paths(
    node: Node,
    output: int,
    consumers: dict[tuple[Node, int], list[tuple[Node, int]]],
    rows: int,
    call: Call,
) -> list[list[tuple[Node, int]]]:
    """All ways from an output of a node up to a join, each with the join first."""
    found = []
    for consumer, number in consumers.get((node, output), []):
        shapes = [tuple(each.shape) for each in consumer._input_metadata]
        if "Compiled" in consumer.name() or "Tap" in consumer.name() or len(shapes) != 1:
            raise RuntimeError(_no_join(call, consumer.name()))
        (shape,) = shapes
        if shape and shape[0] == rows:
            found.append([(consumer, number)])
            continue
        if (consumer, 0) not in consumers:
            raise RuntimeError(_no_join(call, consumer.name()))
        above = _paths(consumer, 0, consumers, rows, call)
        found += [[*path, (consumer, number)] for path in above]
    return found


def _no_join(call: Call, operation: str) -> str:
    return (
        f"the output of layer '{call.name}' has no sample dimension, and the engine cannot tell what each sample "
        f"adds to its gradient, since it goes through {operation}: expand the layer's input to (rows, ...) before "
        "the layer, or freeze its parameters."
    )
