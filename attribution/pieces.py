"""Put the parts of a value to the words of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

from attribution.errors import AttributionError
from score_store.schema import WordSplit


@dataclass(frozen=True)
class Word:
    """One or several tokens with a text, and the sum of their parts; None: they have none."""

    text: str
    value: float | None
    tokens: int


@dataclass(frozen=True)
class Pieces:
    """The tokens of a sample as the model gets them, each with its piece of the text (score_store.pieces)."""

    texts: Sequence[str]  # of the first tokens; joined they are the text
    tokens: int  # of the whole sample
    name: str  # of the sample, for messages

    def words(self, parts: Sequence[float], by_word: WordSplit) -> list[Word]:
        """Return the text's words with their values.

        A token without a text of its own goes with the next one that has one, and at the end with the one before. The
        first token is no target; the last one of a block is no input. By target, a part of exactly zero is of a token
        that is no target, as those of a prompt: it has no value.

        Args:
            parts: of the sample's value; those of the padding of a batch are zero.

        Raises:
            AttributionError: the parts are not those of these tokens.
        """
        first = 1 if by_word == "target" else 0  # the token whose part comes first
        if len(parts) < self.tokens - 1 or any(parts[self.tokens - first :]):
            raise AttributionError(
                f"{self.name} has {self.tokens} tokens, and {len(parts)} parts of its value that are not theirs: give "
                "the sample the T tokens that the model gets and, by target, the last one's target, T+1 in all; and "
                "pad batches on the right"
            )
        own = [part or None for part in parts] if by_word == "target" else parts
        of_tokens: list[float | None] = [*[None] * first, *own, None]
        words: list[Word] = []
        begun = 0
        for end, text in enumerate(self.texts, 1):
            if text:
                words.append(_word(text, of_tokens[begun:end]))
                begun = end
        if words and begun < len(self.texts):
            last = words.pop()
            words.append(_word(last.text, of_tokens[begun - last.tokens : len(self.texts)]))
        return words


def _word(text: str, parts: Sequence[float | None]) -> Word:
    there = [part for part in parts if part is not None]
    return Word(text, sum(there) if there else None, len(parts))
