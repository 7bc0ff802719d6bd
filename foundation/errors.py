"""User errors, which a command reports in one line. Every other exception is a fault of the program and keeps
its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Input, settings or a machine that do not allow what was asked for.

    The message names the thing, what was seen and what to do. Raised where the error is noticed; caught once,
    at the top of a command.
    """


class ConfigError(UserError):
    """The program cannot be run as asked; the message names the flag, the value seen and what to do."""


@contextmanager
def file_errors(path: Path | str, error_class: type[UserError] = UserError) -> Iterator[None]:
    """Raise an OSError of the block (disk full, no permission, ...) as `error_class`, naming `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{path}" if error.filename in (None, str(path)) else f"{path}: {error.filename}"
        raise error_class(f"{where}: {reason}") from error
