"""Ctrl-C at a point where the run can be saved."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


@contextmanager
def interrupt_deferred() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A Ctrl-C that comes inside raises KeyboardInterrupt at the end: the update of the parameters and the
    record of its scores are both done, or neither is.

    Gives a context manager for a part of it where a Ctrl-C raises at once after all. A process that ignores
    Ctrl-C goes on ignoring it."""
    pending = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        pending = True

    @contextmanager
    def allowed() -> Iterator[None]:
        signal.signal(signal.SIGINT, previous)
        try:
            if pending:
                raise KeyboardInterrupt
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    previous = signal.getsignal(signal.SIGINT)
    handler = remember if callable(previous) else previous
    signal.signal(signal.SIGINT, handler)
    try:
        yield allowed
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        raise KeyboardInterrupt
