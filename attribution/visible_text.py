"""Texts that a stranger wrote, for a page: nothing in them hides, or turns round what stands beside it."""

import unicodedata

# Line ends, tabulators, and formatting characters that words are spelled with: soft hyphen, zero-width
# non-joiner and joiner.
ORDINARY = "\n\t\u00ad\u200c\u200d"
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode's categories of what has no glyph


def visible(text: object) -> str:
    """Control characters, those that turn the direction of writing, and others without a glyph by their
    number, as in ⟦U+202E⟧; ORDINARY ones stay."""
    letters = str(text).replace("\r\n", "\n")
    return "".join(
        f"⟦U+{ord(letter):04X}⟧"
        if letter not in ORDINARY and unicodedata.category(letter) in UNSEEN
        else letter
        for letter in letters
    )
