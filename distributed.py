"""The processes of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from config_file import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place among those of the run."""

    rank: int
    size: int


@contextmanager
def distributed_world() -> Iterator[World]:
    """The set-up and tear-down of the run's processes: one process.

    Raises ConfigError if it was launched as one of several.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ConfigError(
            f"WORLD_SIZE is {size}: runs of several processes are not supported; start one without torchrun"
        )
    yield World(rank=0, size=1)
