"""The report's page: numbers and texts into HTML, by the template report.html.jinja.

The texts are training data, and so are the domains' names: whoever wrote them may have meant them for this
page. Jinja escapes every one of them; `visible` shows what would hide or turn round what stands beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attribution.report.plots import Unit
from attribution.screen import FIRST_CHARACTERS, first_words
from attribution.visible_text import visible


def page(content: Mapping[str, Any]) -> str:
    """The whole HTML file. content: what the template names; a name that is not there is an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"visible": visible, "beginning": beginning, "in_unit": in_unit}
    return templates.get_template("report.html.jinja").render(content)


def in_unit(value: float, unit: Unit) -> str:
    """Three digits and the sign."""
    return f"{value * unit.factor:+#.3g}".removesuffix(".").replace("-", "−")


def beginning(text: str) -> str:
    """The first words, in a line."""
    words = first_words(text)
    return words if len(words) < FIRST_CHARACTERS else words + "…"
