"""Read JSON beyond the limits of Python's parser: integers of more than 4300 digits, and arrays and objects
nested more than about a thousand deep. RFC 8259, section 9, has no such limits."""

import re
from collections.abc import Callable
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed lacks it

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# NaN and Infinity are not JSON, but Python writes them.
_LITERAL = re.compile(r"null|true|false|NaN|-?Infinity")
_LITERAL_VALUES = {"null": None, "true": True, "false": False}
_OPEN_OBJECT, _OPEN_ARRAY = 0, 1

State = Callable[[], "State | None"]


def read_outer_values(document: str, depth: int) -> object:
    """Return what `json.loads` returns, with members of the outer objects only.

    Arrays and the objects deeper than `depth` are empty, and all numbers are 0. Slower than `json.loads`.
    Errors have the same message and position.

    Args:
        depth: of the deepest objects whose members are returned. The outermost object has depth 1.

    Raises:
        JSONDecodeError: the document is not JSON.
    """
    return _Reader(document, depth).document()


class _Reader:
    """Parse a document in one pass, without recursion.

    Each state reads a piece and returns the next state. An open array or object takes one byte of memory.
    """

    def __init__(self, document: str, depth: int) -> None:
        self._text = document
        self._depth = depth
        self._position = 0
        self._open = bytearray()  # _OPEN_OBJECT or _OPEN_ARRAY, the outermost first
        self._objects: list[dict[str, object] | None] = []  # the outermost `depth` of _open; None: an array
        self._names = [""] * depth  # name of the member that is being read, in each of these
        self._result: object = None

    def document(self) -> object:
        self._skip_space()
        state: State | None = self._value
        while state is not None:
            state = state()
        if self._position < len(self._text):
            raise self._error("Extra data")
        return self._result

    def _value(self) -> State:
        """Read a value; of an array or object, only the opening bracket."""
        character = self._peek()
        if character == "{":
            members: dict[str, object] = {}
            self._enter(members, members, _OPEN_OBJECT)
            return self._after if self._peek() == "}" else self._name
        if character == "[":
            self._enter([], None, _OPEN_ARRAY)
            return self._after if self._peek() == "]" else self._value
        if character == '"':
            value, self._position = scanstring(self._text, self._position + 1)
            self._store(value)
        elif match := _LITERAL.match(self._text, self._position):
            self._position = match.end()
            self._store(_LITERAL_VALUES.get(match[0], 0))
        elif match := _NUMBER.match(self._text, self._position):
            self._position = match.end()
            self._store(0)
        else:
            raise self._error("Expecting value")
        return self._after

    def _name(self) -> State:
        """Read a member's name and the colon after it."""
        if self._peek() != '"':
            raise self._error("Expecting property name enclosed in double quotes")
        name, self._position = scanstring(self._text, self._position + 1)
        if len(self._open) <= self._depth:
            self._names[len(self._open) - 1] = name
        self._skip_space()
        if self._peek() != ":":
            raise self._error("Expecting ':' delimiter")
        self._skip_character()
        return self._value

    def _after(self) -> State | None:
        """Read what follows a value: a comma, a closing bracket or the document's end."""
        self._skip_space()
        if not self._open:
            return None
        kind, character = self._open[-1], self._peek()
        if character == "}]"[kind]:
            self._open.pop()
            del self._objects[len(self._open) :]
            self._position += 1
            return self._after
        if character != ",":
            raise self._error("Expecting ',' delimiter")
        self._skip_character()
        return self._name if kind == _OPEN_OBJECT else self._value

    def _enter(self, value: object, members: dict[str, object] | None, kind: int) -> None:
        self._store(value)
        self._open.append(kind)
        if len(self._open) <= self._depth:
            self._objects.append(members)
        self._skip_character()

    def _store(self, value: object) -> None:
        level = len(self._open)
        if level == 0:
            self._result = value
        elif level <= self._depth and (members := self._objects[level - 1]) is not None:
            members[self._names[level - 1]] = value

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _skip_character(self) -> None:
        self._position += 1
        self._skip_space()

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._position)
        assert match is not None
        self._position = match.end()

    def _error(self, message: str) -> JSONDecodeError:
        return JSONDecodeError(message, self._text, self._position)
