"""Parameters that are used more than once in a pass: by several layers that share them, or by several calls.

The per-sample gradient of such a parameter is the sum over its uses, so its dot products have cross terms
between them. The uses' backwards hand over descriptions; the one that comes last contracts them together. A
link, a tensor that goes from each use to the next in the forward pass and touches no value, makes sure which
one that is: autograd runs a use's backward only after those of all later uses that the loss depends on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .descriptions import Description, Matrix, Rows, joined
from .sinks import DotProducts, HeadPart, Site

Returned = tuple[Tensor | None, Tensor | None]
"""What a use's backward returns: the parameter's gradient, and dots (n, k); None where another use does."""


@dataclass
class Shared:
    """One parameter's uses in one pass, by their positions in the order of the forward pass."""

    positions: list[int] = field(default_factory=list)
    tokens: dict[int, Tensor] = field(default_factory=dict)  # (N, L) of each use that is a lookup
    waiting: dict[int, Description] = field(default_factory=dict)
    head: HeadPart | None = None

    @property
    def tied(self) -> bool:
        """Whether some uses are lookups and others are not: embeddings tied to an output layer."""
        return 0 < len(self.tokens) < len(self.positions)

    def all_tokens(self) -> Tensor:
        """Return the tokens (N, L) of all lookups, one after the other."""
        return torch.cat([self.tokens[each] for each in sorted(self.tokens)], 1)

    def lookups(self) -> Rows:
        """Return all lookups as one; those that the loss does not depend on have a gradient of zero."""
        (some, *_) = (each for each in self.waiting.values() if isinstance(each, Rows))
        parts: list[Description] = []
        for position in sorted(self.tokens):
            zeros = some.gradients.new_zeros(*self.tokens[position].shape, some.gradients.shape[-1])
            parts.append(self.waiting.pop(position, Rows(self.tokens[position], zeros, some.ignored)))
        together = joined(parts, ())
        assert isinstance(together, Rows)
        return together


@dataclass
class Uses:
    """The calls, in one pass, of a group of layers that share parameters."""

    calls: int = 0
    link: Tensor | None = None
    parameters: dict[int, Shared] = field(default_factory=dict)  # by id of the parameter

    def enter(self, parameters: Iterable[Tensor], tokens: Tensor | None) -> int:
        """Count a call that uses these parameters; tokens (N, L): of a lookup. Returns the call's position."""
        position = self.calls
        self.calls += 1
        for parameter in parameters:
            shared = self.parameters.setdefault(id(parameter), Shared())
            shared.positions.append(position)
            if tokens is not None:
                shared.tokens[position] = tokens
        return position

    def alone(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether each of these parameters is used once in this pass."""
        return all(len(self.parameters[id(parameter)].positions) == 1 for parameter in parameters)

    def take(
        self, sink: DotProducts, site: Site, parameter: Tensor, position: int, description: Description
    ) -> Returned:
        """Take the description that a use's backward has made."""
        shared = self.parameters[id(parameter)]
        if shared.positions == [position]:
            return sink.take(site, description)
        shared.waiting[position] = description
        last = position == shared.positions[0]  # of the backward pass
        if shared.tied and not isinstance(description, Rows):
            return self._take_head(sink, site, shared, position, last)
        if not last:
            return None, None
        if shared.tokens:
            # Nothing else may hold the gradient, or autograd copies it where it could take it.
            head, shared.head = shared.head, None
            return sink.rows(site, shared.lookups(), head)
        parts = [shared.waiting.pop(each) for each in sorted(shared.waiting)]
        return sink.take(site, joined(parts, site.shape))

    def _take_head(
        self, sink: DotProducts, site: Site, shared: Shared, position: int, last: bool
    ) -> Returned:
        matrices = [each for each in shared.positions if each not in shared.tokens]
        if position != matrices[0]:
            return None, None  # another use of the output layer is to come
        parts = [shared.waiting.pop(each) for each in matrices if each in shared.waiting]
        together = joined(parts, site.shape)
        assert isinstance(together, Matrix), f"an output layer described by {type(together).__name__}"
        head, dots = sink.head(site, *together.factors(), shared.all_tokens())
        return self.take_head(sink, site, shared, head, dots, last)

    @staticmethod
    def take_head(
        sink: DotProducts, site: Site, shared: Shared, head: HeadPart, dots: Tensor, last: bool
    ) -> Returned:
        """Take an output layer's part of a tied weight; the lookups finish it."""
        shared.head = head
        if not last:
            return None, dots
        total, dots_of_lookups = sink.rows(site, shared.lookups(), head)
        return total, dots + dots_of_lookups
