"""Ctrl-C at a point where the run can be saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """A Ctrl-C that comes inside raises KeyboardInterrupt at the end: the update of the parameters and the
    record of its scores are both done, or neither is."""
    pending = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        pending = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        raise KeyboardInterrupt
