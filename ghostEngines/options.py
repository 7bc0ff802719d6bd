"""The options of an engine that can be checked without a model."""

from foundation.granularity import GRANULARITIES

from .errors import AttachError
from .passes import DIRECTIONS
from .strategies import STRATEGIES


def check_options(
    val_batch_size: int, granularity: str, direction: str, strategy: str | None, micro_batches: int
) -> None:
    """Raise AttachError for an unknown option, or options that do not go together."""
    for name, number in (("val_batch_size", val_batch_size), ("micro_batches", micro_batches)):
        if number < 1:
            raise AttachError(f"{name} must be at least 1, got {number}")
    if granularity not in GRANULARITIES:
        raise AttachError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if direction not in DIRECTIONS:
        raise AttachError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if strategy is not None and strategy not in STRATEGIES:
        raise AttachError(f"strategy must be one of {', '.join(STRATEGIES)} or None, got {strategy!r}")
    by_direction = strategy is None or STRATEGIES[strategy].by_direction
    if direction == "adamw" and not by_direction:
        raise AttachError(f'strategy "{strategy}" makes no direction to precondition: choose another one')
    if micro_batches > 1 and (granularity == "pairwise" or not by_direction):
        raise AttachError(
            f"several micro-batches with granularity={granularity!r} and strategy={strategy!r}: pairwise "
            "scores and gram need the validation rows in every pass, and only the first has them"
        )
