"""Parse and write lists of domains on the command line.

They read `ArXiv,"C4: news, en"`; with weights `ArXiv:2,Pile-CC:1`; after a split `val:ArXiv,Pile-CC`. A name
is quoted if it holds a comma or a colon, begins with a double quote, or begins or ends with a space. A double
quote inside quotes is doubled.
"""

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from foundation.errors import ConfigError

QUOTING = "a name with a comma or a colon is put in double quotes: '\"C4: news, en\",ArXiv'"

# One entry: a name, quoted or bare; an optional weight; a comma or the end.
ENTRY = re.compile(
    r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<bare>(?!")[^,:]*))\s*(?::(?P<weight>[^,]*))?(?P<end>,|\Z)'
)

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Selection:
    """A split, or some of its domains, as selected by a flag."""

    flag: str  # as given, for messages
    value: str  # as given, for messages
    split: str
    domains: tuple[str, ...] | None  # None: all
    weights: dict[str, float] | None = None  # domain -> weight, for all of `domains`; None: no weights

    @property
    def given(self) -> str:
        """The flag as it was given, for messages."""
        return f"{self.flag} {self.value!r}"

    def only(self, domains: Iterable[str]) -> str:
        """Return the flag, restricted to these domains, quoted for a shell."""
        kept = set(domains)
        assert self.domains is not None
        entries = [
            quoted(name) + (f":{str(self.weights[name]).removesuffix('.0')}" if self.weights else "")
            for name in self.domains
            if name in kept
        ]
        before = "" if self.flag == "--domains" else f"{self.split}:"
        return f"{self.flag} {shlex.quote(before + ','.join(entries))}"


def parse_set(flag: str, value: str) -> Selection:
    """Parse SPLIT or SPLIT:DOMAIN,DOMAIN.

    Raises:
        ConfigError: the split cannot be a folder's name; there are weights; and as `parse_domains`.
    """
    split, colon, domains = value.partition(":")
    if split in ("", ".", "..") or "/" in split or (colon and not domains):
        raise ConfigError(
            f"{flag} {value!r}: must be SPLIT or SPLIT:DOMAIN,DOMAIN, as in val or val:Pile-CC,ArXiv"
        )
    if not colon:
        return Selection(flag, value, split, None)
    names, weights = _parse(f"{flag} {value!r}", domains)
    if any(weight is not None for weight in weights):
        raise ConfigError(f"{flag} {value!r}: only --domains takes weights (NAME:WEIGHT); {QUOTING}")
    return Selection(flag, value, split, names)


def parse_domains(value: str, split: str) -> Selection:
    """Parse `--domains`: "ArXiv,Wikipedia (en)", or with weights "ArXiv:2,Pile-CC:1".

    Raises:
        ConfigError: a name is empty or repeated; quotes do not match; a weight is not finite and above 0;
            only some names have weights.
    """
    given = f"--domains {value!r}"
    names, weights = _parse(given, value)
    if all(weight is None for weight in weights):
        return Selection("--domains", value, split, names)
    numbers = {name: _weight(given, name, weight or "") for name, weight in zip(names, weights, strict=True)}
    return Selection("--domains", value, split, names, numbers)


def _parse(given: str, text: str) -> tuple[tuple[str, ...], list[str | None]]:
    """Return the names, and the text after each one's colon; None without a colon."""
    names: list[str] = []
    weights: list[str | None] = []
    place, more = 0, True
    while more:
        entry = ENTRY.match(text, place)
        if entry is None:
            raise ConfigError(f"{given}: the quotes at {text[place:].strip()!r} do not match; {QUOTING}")
        bare = entry["quoted"] is None
        name = entry["bare"].strip() if bare else entry["quoted"].replace('""', '"')
        if not name:
            raise ConfigError(
                f"{given}: an empty name; say ArXiv,Pile-CC or, in --domains, ArXiv:2,Pile-CC:1"
            )
        if name in names:
            raise ConfigError(f"{given}: {name!r} is named twice")
        names.append(name)
        weights.append(entry["weight"])
        place, more = entry.end(), entry["end"] == ","
    return tuple(names), weights


def _weight(given: str, name: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError as error:
        raise ConfigError(
            f"{given}: {name!r} has the weight {weight!r}, not a number; all have one, or none; {QUOTING}"
        ) from error
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{given}: {name!r} has the weight {weight!r}, not a finite one above 0")
    return value


def quoted(name: str) -> str:
    """Return the name as an entry of a list."""
    plain = name == name.strip() and not name.startswith('"') and not set(name) & set(",:")
    return name if plain else '"' + name.replace('"', '""') + '"'


def shown(name: str) -> str:
    """Return the name as an entry of a list in a message, with control characters escaped."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], quoted(name))


def listed(names: Iterable[str]) -> str:
    """Return the names as a list in a message."""
    return ", ".join(map(shown, names))
