"""Weights used without calling their layer: the dot products would miss that part of their gradient."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .graph import ACCUMULATE, graph_nodes
from .tapped import TappedLayer


def find_bypass(loss: Tensor, probes: Sequence[Tensor], layers: Sequence[TappedLayer]) -> str | None:
    """Return the name of a layer whose parameter has a gradient from anything but calls of covered layers.

    A tap sends a gradient to a probe as well as to the parameters. So a node that sends one to a parameter
    and none to a probe is not a tap. A compiled block is a single node: there the number of uses is compared
    with the number of calls.

    Returns:
        None if there is no such layer.
    """
    names: dict[int, str] = {}  # by id of the parameter: the first layer that has it
    calls: Counter[int] = Counter()  # by id of the parameter: how many calls may use it
    for tapped in layers:
        for parameter in tapped.parameters():
            names.setdefault(id(parameter), tapped.name)
            calls[id(parameter)] += max(1, tapped.calls)
    uses: Counter[int] = Counter()
    probe_ids = {id(probe) for probe in probes}
    for node in graph_nodes(loss):
        children: list[Any] = [child for child, _ in node.next_functions if child is not None]
        leaves = [id(child.variable) for child in children if child.name() == ACCUMULATE]
        for leaf in leaves:
            if leaf in names:
                uses[leaf] += 1
                if probe_ids.isdisjoint(leaves) or uses[leaf] > calls[leaf]:
                    return names[leaf]
    return None


def raise_bypassed(name: str | None) -> None:
    """Raise RuntimeError for the layer that `find_bypass` returned; do nothing for None."""
    if name is not None:
        raise RuntimeError(
            f"the weight of layer '{name}' was used in another way than by calling the "
            "layer: that part of its gradient is in no dot product, and the validation rows' part of "
            "it in .grad. If another module reads the weight, call the layer instead; or take that module as one "
            "layer, ghostEngines.register_unit(ItsClass); or freeze the weight."
        )
