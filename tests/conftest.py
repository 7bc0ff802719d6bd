"""Fixtures of several test modules."""

import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partialmethod
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
def tiles_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many numbers a tile of a weight has, with sides as short as that makes them."""
    from ghostEngines import contraction

    def set_to(numel: int) -> None:
        monkeypatch.setattr(contraction, "SIDE", 1)
        monkeypatch.setattr(contraction, "TILE_NUMEL", numel)

    return set_to


@pytest.fixture
def compiled_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """`module.compile()` traces the graphs and runs them as they are: no compiler is needed."""
    import torch
    from torch import nn

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))


@pytest.fixture
def gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether there seems to be a GPU."""
    import torch

    return lambda there: monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


@pytest.fixture
def values_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's checks of tensors' values are left out: a GPU makes them itself, and tensors without values
    have none."""
    from ghostEngines import losses

    check = losses.require
    for name, module in list(sys.modules.items()):
        if name.startswith("ghostEngines.") and getattr(module, "require", None) is check:
            monkeypatch.setattr(module, "require", lambda condition, message: None)


@pytest.fixture
def waits_to_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the trainer looks at the device's values in the steps that are logged alone."""
    from training_loop import Trainer

    monkeypatch.setattr(Trainer, "_waits", Trainer._logs)


@pytest.fixture
def wandb_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases takes the key, whatever it is."""
    import wandb

    monkeypatch.setattr(wandb, "login", lambda: True)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """No more than 64 files can be opened besides those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest + 65, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
