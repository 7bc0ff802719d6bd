"""Reading the autograd graph of a loss."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

ACCUMULATE = "torch::autograd::AccumulateGrad"  # the node that adds a gradient to a parameter's .grad


def graph_nodes(loss: Tensor) -> Iterator[Node]:
    """Yield every node of the loss's graph once."""
    assert loss.grad_fn is not None
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def _is_link(node: Node, output: int) -> bool:
    """Return whether an output only orders the backward passes of a parameter's uses (uses.py)."""
    return node.name() == "TapBackward" and output == node.outputs  # type: ignore[attr-defined]


class Graph:
    """The autograd graph of a loss, without the links between uses."""

    def __init__(self, loss: Tensor) -> None:
        self.nodes = list(graph_nodes(loss))
        # (node, output) -> the nodes that take this output, each with the number of its input.
        self.consumers: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for number, (child, output) in enumerate(node.next_functions):
                if child is not None and not _is_link(child, output):
                    self.consumers.setdefault((child, output), []).append((node, number))

    def reached_from(self, sources: set[Node]) -> set[Node]:
        """Return the sources and all nodes whose result depends on one of them."""
        above: dict[Node, list[Node]] = {}
        for (child, _), takers in self.consumers.items():
            above.setdefault(child, []).extend(node for node, _ in takers)
        reached, stack = set(sources), list(sources)
        while stack:
            for node in above.get(stack.pop(), []):
                if node not in reached:
                    reached.add(node)
                    stack.append(node)
        return reached


def is_reentrant(loss: Tensor) -> bool:
    """Return True if the loss depends on reentrant activation checkpointing."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(loss))
