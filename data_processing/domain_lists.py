"""Lists of domains on the command line: `ArXiv,"C4: news, en"`; with weights `ArXiv:2,Pile-CC:1`; after the
name of a split `val:ArXiv,Pile-CC`.

A name is put in double quotes if it holds a comma or a colon, begins with a double quote, or begins or ends
with a space; a double quote within these is written twice.
"""

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from foundation.errors import ConfigError

QUOTING = "a name with a comma or a colon is put in double quotes: '\"C4: news, en\",ArXiv'"

# One domain: "quoted" or bare; perhaps a weight; a comma or the end.
ENTRY = re.compile(
    r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<bare>(?!")[^,:]*))\s*(?::(?P<weight>[^,]*))?(?P<end>,|\Z)'
)

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Selection:
    """What a flag selects: a split, or some of its domains. flag, value: as given, for messages."""

    flag: str
    value: str
    split: str
    domains: tuple[str, ...] | None  # None: all
    weights: dict[str, float] | None = None  # of each of the domains

    @property
    def given(self) -> str:
        """The flag as it was given, for messages."""
        return f"{self.flag} {self.value!r}"

    def only(self, domains: Iterable[str]) -> str:
        """Return the flag with those of its domains that are among these, to be pasted into a shell."""
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

    Raises ConfigError for a split that cannot be a folder, for weights, and as `parse_domains`.
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

    Raises ConfigError for an empty or repeated name, quotes that do not match, a weight that is not finite
    and above 0, and weights for some names only.
    """
    given = f"--domains {value!r}"
    names, weights = _parse(given, value)
    if all(weight is None for weight in weights):
        return Selection("--domains", value, split, names)
    numbers = {name: _weight(given, name, weight or "") for name, weight in zip(names, weights, strict=True)}
    return Selection("--domains", value, split, names, numbers)


def _parse(given: str, text: str) -> tuple[tuple[str, ...], list[str | None]]:
    """Return the names, and what stands after the colon of each; None without a colon."""
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
    """Return the name as an entry of a list in a message of one line: control characters as escapes."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], quoted(name))


def listed(names: Iterable[str]) -> str:
    """Return the names as a list in a message."""
    return ", ".join(map(shown, names))
