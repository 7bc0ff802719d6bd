"""Cut a text into the pieces that its tokens stand for."""

from collections.abc import Callable, Sequence


def pieces_of(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[str]:
    """Return each token's piece of the text of them all, which is the pieces joined.

    The text is decoded again with each token more: what a token stands for depends on those before it in some
    vocabularies. A character of several tokens is the last one's, and the pieces of the others are empty; so are those
    of tokens without a text of their own.

    Args:
        decode: the tokenizer's, from tokens to a text; what is left of a character that is cut is any other letters.
    """
    ids = [int(token) for token in tokens]
    text = decode(ids)
    pieces, done = [""] * len(ids), 0
    for count in range(1, len(ids)):
        begun = decode(ids[:count])
        # A beginning that the text does not have ends within a character, or in what the next token changes.
        if len(begun) > done and text.startswith(begun):
            pieces[count - 1], done = text[done : len(begun)], len(begun)
    if pieces:
        pieces[-1] = text[done:]
    return pieces
