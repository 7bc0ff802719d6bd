"""Reading the autograd graph of a loss."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

ACCUMULATE = "torch::autograd::AccumulateGrad"  # the node at which a gradient arrives at a parameter


def graph_nodes(loss: Tensor) -> Iterator[Node]:
    """Yield every node of the graph behind the loss, once."""
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
    """Whether an output only puts the backwards of a parameter's uses in order (uses.py)."""
    return node.name() == "TapBackward" and output == node.outputs  # type: ignore[attr-defined]


class Graph:
    """The graph behind a loss. nodes: all of it; consumers: of each output of each node, the nodes that take
    it, and as which of their inputs."""

    def __init__(self, loss: Tensor) -> None:
        self.nodes = list(graph_nodes(loss))
        self.consumers: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for number, (child, output) in enumerate(node.next_functions):
                if child is not None and not _is_link(child, output):
                    self.consumers.setdefault((child, output), []).append((node, number))

    def reached_from(self, sources: set[Node]) -> set[Node]:
        """Return the nodes whose result depends on that of a source, the sources themselves included."""
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


def find_bypass(
    loss: Tensor,
    probes: Sequence[Tensor],
    layers: Sequence[tuple[str, Sequence[Tensor]]],
    calls: Mapping[int, int],
) -> str | None:
    """Return the name of a layer whose parameter gets a gradient from anything but calls of covered layers;
    None if there is none.

    A tap sends a gradient to a probe as well as to the parameters, so a node that sends one to a parameter
    and none to a probe is no tap. calls: how many calls may use each parameter, by its id. Of a compiled
    block the graph shows one node only.
    """
    names = {id(parameter): name for name, parameters in layers for parameter in reversed(parameters)}
    uses: Counter[int] = Counter()
    probe_ids = {id(probe) for probe in probes}
    for node in graph_nodes(loss):
        children: list[Any] = [child for child, _ in node.next_functions if child is not None]
        leaves = [id(child.variable) for child in children if child.name() == ACCUMULATE]
        for leaf in leaves:
            if leaf in names:
                uses[leaf] += 1
                if probe_ids.isdisjoint(leaves) or uses[leaf] > calls.get(leaf, 0):
                    return names[leaf]
    return None


def raise_bypassed(name: str | None) -> None:
    """Raise RuntimeError for a layer that `find_bypass` has found; None: it found none."""
    if name is not None:
        raise RuntimeError(
            f"the weight of layer '{name}' was used in another way than by calling the "
            "layer: that part of its gradient is in no dot product, and the validation rows' part of "
            "it in .grad. If another module reads the weight, call the layer instead; or take that module as one "
            "layer, ghostEngines.register_unit(ItsClass); or freeze the weight."
        )


def is_reentrant(loss: Tensor) -> bool:
    """Return whether the loss depends on reentrant activation checkpointing."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(loss))
