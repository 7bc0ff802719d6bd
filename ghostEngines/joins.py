"""Tensors without a sample dimension, and the joins where they meet the samples.

Such tensors are position embeddings, tables of relative positions, scales, class tokens, and weights that a
module uses in its own way. The gradient that arrives at such a tensor is a sum over the samples. One node
later in the graph the gradients of single samples are still separate. That node is the join: the first
operation whose result has the sample dimension, because its other input has it or because it expands. A hook
on the join takes the gradient of its result and describes what each sample adds to the tensor's gradient:

- for a lookup in the parameter itself, or a matrix product with it: as the rule of an embedding or a linear
  layer does;
- for an elementwise operation: by the operation's own derivative, before the sum over the samples;
- for any other operation: by its own backward function, called once per sample.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .descriptions import Description, Matrix, PerPosition, PerSample, Rows
from .graph import Graph
from .row_maps import Identity, Indexed, RowMap, Samples, by_sample
from .tap import Call

# A larger parameter is divided by sample only in a lookup or a matrix product: else each sample's gradient is
# written out.
LARGEST = 1 << 20

Path = list[tuple[Node, int]]
"""The operations from the join down to the tensor, each with the number of the input on the path."""


class Join:
    """One join of a tensor without a sample dimension."""

    def __init__(self, call: Call, path: Path, row_map: RowMap, samples: int, shape: torch.Size) -> None:
        """Put a hook on the join.

        Args:
            path: from the join down to the tensor.
            row_map: of the join's result.
            samples: N.
            shape: of the tensor.
        """
        self.call, self.path, self.row_map, self.samples, self.shape = call, path, row_map, samples, shape
        self._handle = path[0][0].register_prehook(self.hook)

    def remove(self) -> None:
        """Remove the hook and drop the path, which holds the graph."""
        self._handle.remove()
        self.path = []

    def hook(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Describe what each sample adds to the tensor's gradient; a hook on the join."""
        (gradient,) = gradients
        if gradient is None:
            return
        if self.call.guard is not None and self.call.guard.watches_rows(self.call, gradient, self.row_map):
            return
        assert self.call.at_joins is not None
        described = self._described(gradient)
        if not isinstance(described, PerSample):
            described = by_sample(described, self.row_map)
        self.call.at_joins.append(described)

    def _described(self, gradient: Tensor) -> Description:
        """Return the description by entries of the join's result, or the gradients by sample."""
        names = [node.name() for node, _ in self.path]
        join, number = self.path[0]
        if self.call.rule.parameter:
            if names == ["EmbeddingBackward0"]:
                padding: int = join._saved_padding_idx  # type: ignore[attr-defined]
                # PyTorch stores "no padding" as -1 or as the largest unsigned number.
                ignored = padding if 0 <= padding < self.shape[0] else None
                return Rows(join._saved_indices, gradient, ignored)  # type: ignore[attr-defined]
            if names[0] in ("MmBackward0", "AddmmBackward0") and number == _second(names[0]):
                left = join._saved_self if names[0] == "MmBackward0" else join._saved_mat1  # type: ignore[attr-defined]
                if names[1:] == ["TBackward0"]:
                    return Matrix(gradient, left)
                if not names[1:]:
                    return Matrix(left, gradient)
            apart = self._by_position(gradient)
            if apart is not None:
                return apart
        each = _elementwise(join, number, gradient, _input_shape(join, number), self._leading)
        if each is not None and not isinstance(self.row_map, Identity):
            each = self.row_map.to_rows(each).sum(1)
        parts: Sequence[Tensor] | None = None if each is None else list(each)
        if len(self.path) == 1 and each is not None:
            return PerSample(each.reshape(self.samples, *self.shape))
        with torch.no_grad():
            rows = [
                self._of_sample(gradient, i, None if parts is None else parts[i]) for i in range(self.samples)
            ]
        return PerSample(torch.stack(rows))

    def _by_position(self, gradient: Tensor) -> Description | None:
        """Return what each position adds to a parameter's gradient in an elementwise operation, if that is asked for.

        The second dimension is then kept apart, too. None: it is not asked for, or there is no such dimension.
        """
        if not self.call.sink.split.positions or len(self.path) > 1 or not isinstance(self.row_map, Identity):
            return None
        join, number = self.path[0]
        apart = _elementwise(join, number, gradient, self.shape, leading=2)
        return None if apart is None else PerPosition(apart)

    @property
    def _leading(self) -> int:
        """Return how many leading dimensions of the result decide which sample an entry belongs to."""
        return self.row_map.rows.dim() if isinstance(self.row_map, Indexed) else 1

    def _of_sample(self, gradient: Tensor, i: int, below: Tensor | None) -> Tensor:
        """Return the tensor's gradient for sample i, by the backward function of each operation on the path.

        Args:
            gradient: of the join's result.
            below: sample i's gradient of the join's input; None: unknown.
        """
        part, path = gradient, self.path
        if below is None:
            this = torch.arange(self.samples, device=gradient.device) == i
            own = self.row_map.of_rows(this, len(gradient))
            part = torch.zeros_like(gradient)
            part[own] = gradient[own]
        else:
            part, path = below, self.path[1:]
        for node, number in path:
            results = node(part)  # type: ignore[operator]
            part = results[number] if isinstance(results, tuple) else results
            part = part.sum_to_size(_input_shape(node, number))  # as autograd does between nodes
        return part.reshape(self.shape)


def _second(name: str) -> int:
    """Return which input of a matrix product is its second factor."""
    return 1 if name == "MmBackward0" else 2


def _input_shape(node: Node, number: int) -> torch.Size:
    child, output = node.next_functions[number]
    assert child is not None
    return torch.Size(child._input_metadata[output].shape)


def _elementwise(node: Node, number: int, gradient: Tensor, shape: torch.Size, leading: int) -> Tensor | None:
    """Return the gradient of an elementwise operation's input before the sum over the samples.

    Args:
        gradient: of the result.
        shape: of the input, which has none of the leading dimensions.
        leading: the number of leading dimensions.

    Returns:
        (*leading dimensions, *shape); None for other operations.
    """
    name = node.name()
    if name == "ExpandBackward0" or (name in ("AddBackward0", "SubBackward0") and number == 0):
        local = gradient
    elif name in ("AddBackward0", "SubBackward0") and node._saved_alpha == 1:  # type: ignore[attr-defined]
        local = gradient if name == "AddBackward0" else -gradient
    elif name == "MulBackward0":
        other = node._saved_other if number == 0 else node._saved_self  # type: ignore[attr-defined]
        if other is None:
            return None
        local = gradient * other
    elif name == "AddmmBackward0" and number == 0 and node._saved_beta == 1:  # type: ignore[attr-defined]
        local = gradient
    else:
        return None
    padded = (1,) * (local.dim() - len(shape)) + tuple(shape)
    if len(shape) > local.dim() or any(size != 1 for size in padded[:leading]):
        return None
    summed = [dim for dim in range(leading, local.dim()) if padded[dim] == 1 and local.shape[dim] > 1]
    if summed:
        local = local.sum(summed, keepdim=True)
    return local.reshape(*local.shape[:leading], *shape)


def hook_joins(graph: Graph, free: list[tuple[Call, Node]], samples: Samples) -> list[Join]:
    """Put hooks on the joins of all tensors without a sample dimension.

    Remove them at the end of the step: they hold the graph that holds them.

    Args:
        free: the calls whose outputs have no sample dimension, with their taps. It is emptied: it holds the
            graph.

    Raises:
        RuntimeError: the loss depends on tensors whose joins cannot be divided by sample; it names all of
            them.
    """
    found, lost = [], {}
    bearing = graph.reached_from({node for call, node in _taps(graph) if not call.free})
    for call, node in free:
        call.at_joins = []
        shape = torch.Size(node._input_metadata[0].shape)
        for path in _paths(graph, bearing, node, samples.rows, shape.numel()):
            row_map = _row_map_of_join(call, path, shape, samples)
            if row_map is not None:
                found.append(Join(call, path, row_map, samples.count, shape))
            else:
                lost[_what(call)] = path[0][0].name()
    free.clear()
    if lost:
        for join in found:
            join.remove()
        raise RuntimeError(refusal(lost))
    return found


def _taps(graph: Graph) -> Iterator[tuple[Call, Node]]:
    """Yield the calls in the graph with their taps."""
    for node in graph.nodes:
        if node.name() == "TapBackward":
            yield node.call, node  # type: ignore[attr-defined]


def _row_map_of_join(call: Call, path: Path, shape: torch.Size, samples: Samples) -> RowMap | None:
    """Return the row map of a join's result; None if the join cannot be divided by sample."""
    join = path[0][0]
    results = [tuple(each.shape) for each in join._input_metadata]
    names = [node.name() for node, _ in path]
    if len(results) != 1 or any("Compiled" in name or "Tap" in name for name in names):
        return None
    if not all(callable(node) for node, _ in path):
        return None  # an autograd function written in Python
    if call.checkpointed and any(_keeps_tensors(node) for node, _ in path):
        return None  # checkpointing recomputes kept tensors for the operation itself, and only once
    small = not call.rule.parameter or shape.numel() <= LARGEST
    if not (small or names == ["EmbeddingBackward0"] or names[0] in ("MmBackward0", "AddmmBackward0")):
        return None
    return samples.row_map(torch.Size(results[0]), of_result=True)


def _keeps_tensors(node: Node) -> bool:
    """Return True if a node keeps tensors for its backward function."""
    return any(name.startswith("_raw_saved_") for name in dir(node))


def _paths(graph: Graph, bearing: set[Node], node: Node, rows: int, entries: int) -> list[Path]:
    """Return all paths from a node's first output to a join, each with the join first.

    Args:
        bearing: the nodes whose results have the sample dimension.
        rows: of the model's input.
        entries: of the tensor.
    """
    found: list[Path] = []
    for consumer, number in graph.consumers.get((node, 0), []):
        shapes = [tuple(each.shape) for each in consumer._input_metadata]
        ends = (
            consumer in bearing
            or len(shapes) != 1
            # A result with as many entries as before is a view, which does not add the samples.
            or (shapes[0] and shapes[0][0] == rows and torch.Size(shapes[0]).numel() != entries)
            or (consumer, 0) not in graph.consumers
        )
        if ends:
            found.append([(consumer, number)])
        else:
            found += [[*path, (consumer, number)] for path in _paths(graph, bearing, consumer, rows, entries)]
    return found


def _what(call: Call) -> str:
    """Return the name of a call's output, or of its parameter, for a message."""
    kind = type(call.layer)
    if call.rule.parameter:
        return f"'{call.name}.{call.names[0]}' of {kind.__module__}.{kind.__qualname__}"
    return f"the output of layer '{call.name}' of {kind.__module__}.{kind.__qualname__}"


def refusal(lost: dict[str, str]) -> str:
    """Return the message that names what is not covered, and the remedies, the shortest first.

    Args:
        lost: the name of each tensor -> the operation that it goes into.
    """
    shown = "; ".join(f"{what} (it goes into {operation})" for what, operation in lost.items())
    return (
        f"the engine cannot tell what each sample adds to the gradient of {shown}. Leave activation checkpointing "
        "and torch.compile out around it, if there are any; or freeze the parameters "
        "(requires_grad_(False)); or take the module as one layer, slow but exact: "
        "ghostEngines.register_unit(ItsClass); or write a rule: ghostEngines.register_rule(ItsClass)."
    )
