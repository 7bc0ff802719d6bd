"""What all tests rely on."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A Ctrl-C interrupts, also where the tests run as a background job, whose shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
