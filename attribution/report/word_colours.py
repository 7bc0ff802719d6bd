"""Colour the words of a text by their values: from orange, which hurt, over none to blue, which helped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attribution.pieces import Word
from attribution.report.plots import Scale, choose_scale

LEVELS = 5  # shades of either colour; report.css has them
SHARE = 0.95  # of the words, which the shades tell apart: a few are far larger than all others


@dataclass(frozen=True)
class ColouredWords:
    """The words of a text, and the scale of their colours."""

    words: Sequence[Word]
    end: float  # the size of a value from which on a colour is the strongest; 0: none has a colour
    scale: Scale

    def level(self, value: float) -> int:
        """Return the shade of a value, from -LEVELS to LEVELS."""
        if value == 0:
            return 0
        size = min(LEVELS, round(LEVELS * abs(value) / self.end))
        return size if value > 0 else -size


def colour_words(words: Sequence[Word], value_unit: str) -> ColouredWords:
    """Return the words with their scale. value_unit: as in "nats"."""
    sizes = [abs(word.value) for word in words if word.value]  # most words of a long prompt have none
    end = float(np.quantile(sizes, SHARE)) if sizes else 0.0
    return ColouredWords(words, end, choose_scale(end, value_unit))


def level_class(level: int) -> str:
    """Return the name of a shade in report.css."""
    return f"{'help' if level > 0 else 'hurt'}-{abs(level)}" if level else "even"
