"""Command line flags from a dataclass: each field says its flag's type, choices, bounds and help text."""

import argparse
import math
from collections.abc import Callable
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
    may_change: bool = False,
    alone: str | None = None,
) -> Any:
    """A field that is a flag. `doc` is its documentation, in the source and in --help. may_change: whether it
    may be another one when a run is resumed. alone: what the flag means without a value [it needs one]."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"doc": doc, "may_change": may_change, "alone": alone, **bounds})


def flags_of(config: Any) -> list[Field[Any]]:
    """The fields that are flags, of a dataclass or of an instance."""
    return [spec for spec in fields(config) if "doc" in spec.metadata]


def check_flags(config: Any) -> None:
    """What fields say of themselves: choices, bounds, nothing empty. ConfigError at the first error."""
    for spec in flags_of(config):
        value = getattr(config, spec.name)
        choices = get_args(spec.type) if get_origin(spec.type) is Literal else ()
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
    """A parser whose result has what was given, and nothing else: the defaults stand in the fields alone."""
    parser = ArgumentParser(
        program,
        "%(prog)s [--flag value ...]  (--help lists the flags)",
        description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for spec in flags_of(config_class):
        parser.add_argument(f"--{spec.name}", help=_help(spec), **_argument(spec))
    return parser


def _help(spec: Field[Any]) -> str:
    default = ",".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
    text = spec.metadata["doc"] if default is None else f"{spec.metadata['doc']} [{default}]"
    return text.replace("%", "%%")


def _argument(spec: Field[Any]) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    kind: Any = spec.type
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        alone = spec.metadata["alone"]
        optional = {"nargs": "?", "const": alone} if alone is not None else {}
        return {"choices": get_args(kind), **optional}
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
