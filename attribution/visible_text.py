"""Show untrusted text on a page: no hidden characters, none that reverse the text around them."""

import unicodedata

# Line ends, tabs, and the formatting characters of ordinary spelling: soft hyphen, zero-width non-joiner and
# joiner.
ORDINARY = "\n\t\u00ad\u200c\u200d"
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of characters without a glyph


def visible(text: object) -> str:
    """Return the text with every character without a glyph written as its number, as in ⟦U+202E⟧.

    ORDINARY characters stay as they are.
    """
    letters = str(text).replace("\r\n", "\n")
    return "".join(
        f"⟦U+{ord(letter):04X}⟧"
        if letter not in ORDINARY and unicodedata.category(letter) in UNSEEN
        else letter
        for letter in letters
    )
