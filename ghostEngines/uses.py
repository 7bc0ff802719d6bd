"""Parameters used several times in a pass: by layers that share them, or by several calls of a layer.

The per-sample gradient of such a parameter is the sum over its uses, so its dot products have cross terms
between the uses. Each use's backward pass returns a description, and the last one contracts all of them
together. A link makes sure which one is the last: a tensor that each use passes to the next one in the
forward pass and that changes no value. Autograd runs a use's backward pass only after those of all later uses
on which the loss depends.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .descriptions import Description, Matrix, Rows, joined
from .sinks import DotProducts, HeadPart, Site

Returned = tuple[Tensor | None, Tensor | None]
"""What a use's backward pass returns: the parameter's gradient and dots (n, k). None: another use does so."""


@dataclass
class Shared:
    """One parameter's uses in one pass, by their positions in the order of the forward pass."""

    positions: list[int] = field(default_factory=list)
    tokens: dict[int, Tensor] = field(default_factory=dict)  # (N, L) of each use that is a lookup
    waiting: dict[int, Description] = field(default_factory=dict)  # not contracted yet
    head: HeadPart | None = None  # the output layer's part, for the lookups

    @property
    def tied(self) -> bool:
        """Return whether some uses are lookups and others are not: an embedding tied to an output layer."""
        return 0 < len(self.tokens) < len(self.positions)

    def all_tokens(self) -> Tensor:
        """Return the tokens (N, L) of all lookups, one after the other."""
        return torch.cat([self.tokens[each] for each in sorted(self.tokens)], 1)

    def lookups(self) -> Rows:
        """Return all lookups as one. Lookups on which the loss does not depend have a gradient of zero."""
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
    link: Tensor | None = None  # from the last call to the next one
    parameters: dict[int, Shared] = field(default_factory=dict)  # by id of the parameter

    def enter(self, parameters: Iterable[Tensor], tokens: Tensor | None) -> int:
        """Count a call that uses these parameters and return its position.

        Args:
            tokens: (N, L), of a lookup; None for other calls.
        """
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
        """Take the description from a use's backward pass; contract it if no other use is to come."""
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
            # Nothing else may hold the gradient: autograd would copy it then, instead of taking it as it is.
            head, shared.head = shared.head, None
            return sink.rows(site, shared.lookups(), head)
        parts = [shared.waiting.pop(each) for each in sorted(shared.waiting)]
        return sink.take(site, joined(parts, site.shape, by_position=sink.split.positions > 0))

    def _take_head(
        self, sink: DotProducts, site: Site, shared: Shared, position: int, last: bool
    ) -> Returned:
        """Contract the output layer's uses of a tied weight, at the last of them."""
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
        """Store an output layer's part of a tied weight; if the lookups are done, contract them with it."""
        shared.head = head
        if not last:
            return None, dots
        total, dots_of_lookups = sink.rows(site, shared.lookups(), head)
        return total, dots + dots_of_lookups
