"""The engine's options, and the checks of options that need no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from foundation.granularity import GRANULARITIES, Granularity

from .errors import AttachError
from .passes import DIRECTIONS, DirectionKind
from .strategies import STRATEGIES
from .tapped import RowMapMaker


@dataclass(frozen=True)
class EngineOptions:
    """The arguments of GradDotProdEngine, which documents them.

    Raises:
        AttachError: an unknown option, or options that exclude each other.
    """

    val_batch_size: int  # m
    granularity: Granularity
    direction: DirectionKind
    strategy: str | None  # None: chosen by shape
    micro_batches: int  # G
    rows: str | None  # the name of the input that has the rows
    samples: Callable[..., Tensor] | None  # None: samples are rows
    row_maps: Mapping[str, RowMapMaker]  # by layer
    guard: bool

    def __post_init__(self) -> None:
        for name, number in (("val_batch_size", self.val_batch_size), ("micro_batches", self.micro_batches)):
            if number < 1:
                raise AttachError(f"{name} must be at least 1, got {number}")
        if self.granularity not in GRANULARITIES:
            raise AttachError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        if self.direction not in DIRECTIONS:
            raise AttachError(f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise AttachError(
                f"strategy must be one of {', '.join(STRATEGIES)} or None, got {self.strategy!r}"
            )
        if self.granularity == "token":
            self._check_token()
        by_direction = self.strategy is None or STRATEGIES[self.strategy].by_direction
        if self.micro_batches > 1 and (self.granularity == "pairwise" or not by_direction):
            raise AttachError(
                f"several micro-batches with granularity={self.granularity!r} and strategy={self.strategy!r}: pairwise "
                "scores and gram need the validation rows in every pass, and only the first has them"
            )

    def _check_token(self) -> None:
        """Raise AttachError for options that do not go with scores by position."""
        if self.strategy is not None and not STRATEGIES[self.strategy].by_position:
            able = ", ".join(name for name, strategy in STRATEGIES.items() if strategy.by_position)
            raise AttachError(
                f"granularity 'token' with strategy={self.strategy!r}, which has the positions of a row together: "
                f"leave the strategy out, or take one of {able}"
            )
        if self.samples is not None or self.row_maps:
            raise AttachError(
                "granularity 'token' with samples or row_maps: positions are those of the model's rows, which are the "
                "samples then; leave them out, or use another granularity"
            )
