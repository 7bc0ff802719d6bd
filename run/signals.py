"""Ctrl-C, a terminal that closes, and the signals by which batch systems announce the end, at a point where
the run can be saved."""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; what kill, torchrun and schedulers send; what schedulers can be told to send some time before; the
# terminal was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS came, or came to another process of the run; number: which."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """received: the first of SIGNALS that came while the process was told to wait with it; None if none
    did."""

    received: int | None = None


@contextmanager
def stop_signals(*, wait: bool) -> Iterator[StopSignals]:
    """Raise Interrupted at each of SIGNALS while the block runs, or with `wait` note the signal only.

    Of several processes none may stop while the others would wait for it. An ignored signal stays ignored.
    """
    stop = StopSignals()

    def arrived(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            drop_closed_outputs()
        if not wait:
            raise Interrupted(number)
        stop.received = stop.received or number

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, arrived)
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_deferred() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Handle a signal that arrives in the block at its end.

    So the update of the parameters and the record of its scores are both made, or neither. The block gets a function
    that returns a context in which signals interrupt at once.
    """
    pending: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    def deliver() -> None:
        if pending:
            number = pending[0]
            pending.clear()
            previous[number](number, None)

    @contextmanager
    def allowed() -> Iterator[None]:
        for number, handler in previous.items():
            signal.signal(number, handler)
        try:
            deliver()
            yield
        finally:
            for number in previous:
                signal.signal(number, remember)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    previous: dict[int, Any] = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in previous:
        signal.signal(number, remember)
    try:
        yield allowed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    deliver()


def drop_closed_outputs() -> None:
    """Send standard output and standard error to nowhere where nobody reads them any more: the terminal is
    closed, or what was at the other end of a pipe (`| tee log`) ended with it. An error of writing there
    would otherwise take the place of the run's end, and of its exit status."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
