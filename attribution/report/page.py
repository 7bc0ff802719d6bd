"""Render the report's HTML page from the template report.html.jinja.

Texts and domain names are training data and may be hostile. Jinja escapes all of them, and `visible` shows
characters that would hide or reverse the text around them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attribution.pieces import Word
from attribution.report.plots import Scale
from attribution.report.word_colours import LEVELS, level_class
from attribution.screen import FIRST_CHARACTERS, first_words
from attribution.visible_text import visible


def render_page(content: Mapping[str, Any]) -> str:
    """Return the HTML file. content: the template's variables; a missing one raises an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"visible": visible, "beginning": beginning, "scaled": format_scaled}
    templates.globals |= {"word_title": word_title, "level_class": level_class, "levels": LEVELS}
    return templates.get_template("report.html.jinja").render(content)


def format_scaled(value: float, scale: Scale) -> str:
    """Return the value on that scale, with its sign and three digits."""
    return f"{value * scale.factor:+#.3g}".removesuffix(".").replace("-", "−")


def word_title(word: Word, scale: Scale) -> str:
    """Return what the page shows where the pointer rests on a word."""
    assert word.value is not None, "a word without a value has no title"
    tokens = "" if word.tokens == 1 else f" ({word.tokens} tokens)"
    return f"{format_scaled(word.value, scale)}{' ×' if scale.factor != 1 else ''} {scale.name}{tokens}"


def beginning(text: str) -> str:
    """Return a text's first words, on one line."""
    words = first_words(text)
    return words if len(words) < FIRST_CHARACTERS else words + "…"
