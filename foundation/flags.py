"""Generate command line flags from a dataclass: a field has its flag's type, choices, bounds, group and help."""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from foundation.arguments import ArgumentParser
from foundation.errors import ConfigError


def flag(
    default: Any,
    doc: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    choices: Iterable[str] = (),
    may_change: bool = False,
    alone: str | None = None,
    group: str | None = None,
) -> Any:
    """Return a dataclass field that is a flag.

    Args:
        doc: its documentation, in the source and in --help.
        choices: its values, where they are written down elsewhere; a field of type Literal has its own.
        may_change: whether it may differ when a run is resumed.
        alone: its value when the flag is given without one; None: the flag needs a value.
        group: the heading in --help that begins with this flag; None: it belongs to the group before it.
    """
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "may_change": may_change,
        "alone": alone,
        "group": group,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
    }
    return field(default=default, metadata=metadata)


def choices_of(spec: Field[Any]) -> tuple[str, ...]:
    """Return the values that a flag can take; () if they are not a list."""
    listed: tuple[str, ...] = spec.metadata["choices"]
    return listed or (get_args(spec.type) if get_origin(spec.type) is Literal else ())


def flags_of(config: Any) -> list[Field[Any]]:
    """Return the fields that are flags, of a dataclass or of an instance."""
    return [spec for spec in fields(config) if "doc" in spec.metadata]


def check_flags(config: Any) -> None:
    """Check choices and bounds, and that no text is empty. Raises ConfigError at the first error."""
    for spec in flags_of(config):
        value = getattr(config, spec.name)
        choices = choices_of(spec)
        if choices and value not in choices:
            raise ConfigError(f"--{spec.name} {value!r}: not a choice; choose from {', '.join(choices)}")
        if value == "":
            raise ConfigError(f"--{spec.name} '': must not be empty; leave it out for the default")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _check_number(spec, number)


def _check_number(spec: Field[Any], number: float) -> None:
    if not math.isfinite(number):
        raise ConfigError(f"--{spec.name} {number}: must be a finite number")
    if number < spec.metadata["at_least"]:
        raise ConfigError(f"--{spec.name} {number}: must be at least {spec.metadata['at_least']}")
    if number > spec.metadata["at_most"]:
        raise ConfigError(f"--{spec.name} {number}: must be at most {spec.metadata['at_most']}")
    if number <= spec.metadata["above"]:
        raise ConfigError(f"--{spec.name} {number}: must be above {spec.metadata['above']}")


def flag_parser(config_class: type, program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser whose result has the flags that were given and no defaults: those are in the fields."""
    parser = ArgumentParser(
        program,
        "%(prog)s [--flag value ...]  (--help lists the flags)",
        description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    group: Any = parser
    for spec in flags_of(config_class):
        if spec.metadata["group"] is not None:
            group = parser.add_argument_group(spec.metadata["group"])
        group.add_argument(f"--{spec.name}", help=_help(spec), **_argument(spec))
    return parser


def _help(spec: Field[Any]) -> str:
    default = ",".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
    text = spec.metadata["doc"] if default is None else f"{spec.metadata['doc']} [{default}]"
    return text.replace("%", "%%")


def _argument(spec: Field[Any]) -> dict[str, Any]:
    """Return argparse's options for a field of this type."""
    kind: Any = spec.type
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices := choices_of(spec):
        alone = spec.metadata["alone"]
        optional = {"nargs": "?", "const": alone} if alone is not None else {}
        return {"choices": choices, **optional}
    if get_origin(kind) is tuple:
        return {"type": _numbers(len(get_args(kind))), "metavar": ",".join("X" for _ in get_args(kind))}
    (kind,) = [part for part in get_args(kind) or (kind,) if part is not NoneType]
    return {"type": kind, "metavar": kind.__name__.upper()}


def _numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    def numbers(text: str) -> tuple[float, ...]:
        values = tuple(float(part) for part in text.split(","))
        if len(values) != count:
            raise ValueError
        return values

    numbers.__name__ = f"list of {count} numbers with commas"  # argparse: "invalid {name} value: '0.9'"
    return numbers
