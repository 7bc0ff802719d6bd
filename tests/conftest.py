"""What all tests rely on."""

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A Ctrl-C interrupts, also where the tests run as a background job, whose shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny shards, which no test changes."""
    from run_helpers import write_shards  # imports the program, which most tests do not need

    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results for a module's runs, each under a name of its own."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """No more than 64 files can be opened besides those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest + 65, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
