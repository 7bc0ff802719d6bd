"""Cut a text into the pieces that its tokens stand for."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no whole character

Decode = Callable[[list[int]], str]


def pieces_of(decode: Decode, tokens: Sequence[int]) -> list[str]:
    """Return each token's piece of the text of them all, which is the pieces joined.

    What a token stands for depends on those before it in some vocabularies, so each is decoded together with the last
    whole piece before it. A character of several tokens is the last one's, and the pieces of the others are empty; so
    are those of tokens without a text of their own.

    Args:
        decode: the tokenizer's, from tokens to a text; what is left of a character that is cut is any other letters.
    """
    ids = [int(token) for token in tokens]
    text = decode(ids)
    found = _cut(decode, ids, text, in_windows=True)
    if found is None:
        # A decoder that looks back further than a piece gives other letters in a window. Beginnings of the whole text
        # are right for any decoder, in quadratic time.
        found = _cut(decode, ids, text, in_windows=False)
        assert found is not None, "the last beginning of a text is the text"
    return found


def _cut(decode: Decode, ids: list[int], text: str, *, in_windows: bool) -> list[str] | None:
    """Return the pieces of the text; None if what is decoded in windows is not the text.

    Args:
        in_windows: decode from the last whole piece on, and not from the first token.
    """
    pieces, done = [""] * len(ids), 0  # done: letters of the text that have a token
    begin, read = 0, 0  # the window's first token, and the one after the last whole piece
    known = ""  # the window's text that has a token
    cut, place = "", 0  # replacements that follow it, and the token that has them as things stand
    for count in range(1, len(ids) + 1):
        found = decode(ids[begin:count])
        new = found[len(known) :]
        # A text that is not the next one ends within a character, or in what the next token changes.
        if not (new and found.startswith(known) and text.startswith(new, done) and new.startswith(cut)):
            continue
        if new != cut:
            pieces[place] += cut
            whole = new[len(cut) :].rstrip(REPLACEMENT)
            pieces[count - 1] += whole
            known += cut + whole
            done += len(cut + whole)
            cut = new[len(cut + whole) :]
            if not cut and in_windows:
                begin, read = read, count
                known = decode(ids[begin:read])
        # A replacement may be a character of the text whose bytes come with the next tokens.
        place = count - 1
    if ids:
        pieces[place] += cut
    return pieces if done + len(cut) == len(text) else None
