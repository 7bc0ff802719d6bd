"""JSON beyond the limits of Python's parser: json.loads is the oracle below them."""

import json
import random
from collections.abc import Callable

import pytest

from data_processing.deep_json import read_outer_values

DEPTH = 3
PIECES = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    " ",
    '"',
    '"a":',
    '"b"',
    "1",
    "-",
    "0.5e-3",
    "null",
    "NaN",
    "-Infinity",
    "\t",
    "tru",
]


def generated(draw: random.Random, level: int = 0) -> object:
    kind = draw.randrange(9 if level < 6 else 6)
    if kind < 6:
        return ['é\n"', "\ud800", -1.5e-7, 0, float("nan"), draw.choice([None, True, False])][kind]
    values = [generated(draw, level + 1) for _ in range(draw.randrange(4))]
    return values if kind == 6 else {draw.choice("abcde"): value for value in values}


def outer(value: object, level: int = 1) -> object:
    """The oracle's answer, cut as `read_outer_values` says."""
    if isinstance(value, list) or (isinstance(value, dict) and level > DEPTH):
        return type(value)()
    if isinstance(value, dict):
        return {name: outer(member, level + 1) for name, member in value.items()}
    return 0 if isinstance(value, int | float) and not isinstance(value, bool) else value


class Refusal(str):
    """Message and position."""


def answer(parse: Callable[[str], object], document: str) -> object:
    try:
        return parse(document)
    except json.JSONDecodeError as error:
        return Refusal(f"{error.msg}: {error.pos}")


def test_it_reads_and_refuses_what_python_does() -> None:
    draw, refused = random.Random(0), set()
    for number in range(4000):
        document = json.dumps(generated(draw), indent=draw.choice([None, 1]), ensure_ascii=bool(number % 2))
        if number % 4:
            place = draw.randrange(len(document) + 1)
            document = document[:place] + draw.choice(["", *PIECES]) + document[place + draw.randrange(3) :]
        want = answer(lambda text: outer(json.loads(text)), document)
        if not str(want).startswith("Illegal trailing comma"):  # the words of Python 3.13
            assert answer(lambda text: read_outer_values(text, DEPTH), document) == want, document
        refused.add(str(want).partition(":")[0] if isinstance(want, Refusal) else None)
    assert len(refused) > 6


def test_it_has_no_limits() -> None:
    many, digits = 20_000, "7" * 10_000
    for deep in ("[" * many + "]" * many, '{"a":' * many + digits + "}" * many, f"[{digits}, -{digits}.0]"):
        document = f'{{"text": "x", "meta": {{"other": {deep}, "name": "A"}}, "more": {deep}}}'
        found = read_outer_values(document, 2)
        assert isinstance(found, dict) and found["text"] == "x" and found["meta"]["name"] == "A"
        with pytest.raises(json.JSONDecodeError, match="Expecting ',' delimiter") as error:
            read_outer_values(document[:-1], 2)
        assert error.value.pos == len(document) - 1
