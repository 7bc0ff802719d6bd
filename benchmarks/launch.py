"""Starts runs: command lines, and forks of a process that has imported the program and computed nothing, so
that a run of a second does not wait five for its imports."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["main", "pandas"]
)  # found if the working directory is ROOT, else a run imports it


def flags_of(settings: Mapping[str, object]) -> list[str]:
    """A flag that is True is a switch."""
    return [part for name, value in settings.items() for part in _flag(name, value)]


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def torchrun(*arguments: object) -> list[str]:
    """The command for two processes of a script, or of a module after "-m"."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", *launcher, *map(str, arguments)]


def fork(
    action: Callable[..., object], *arguments: object, output: Path, environment: Mapping[str, str]
) -> ForkServerProcess:
    """Starts action(*arguments) in a process of its own with one thread; its exit status is what the action
    returns. What it prints goes to {output}.out and {output}.err. Ends with this process at the latest.

    action: one that can be imported. environment: added to that of the process."""
    process = FORKS.Process(target=_forked, args=(action, arguments, output, environment), daemon=True)
    process.start()
    return process


def _forked(
    action: Callable[..., object], arguments: tuple[object, ...], output: Path, environment: Mapping[str, str]
) -> None:
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        with Path(f"{output}.{kind}").open("w") as file:
            stream.flush()
            os.dup2(file.fileno(), {"out": 1, "err": 2}[kind])
    # As on the command line, and not as this process was started: else what the progress bar locks with is
    # left behind by a process that is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(action(*arguments))


def world_of(size: int) -> tuple[TCPStore, list[dict[str, str]]]:
    """What torchrun does for the processes of a run: where they meet (to be kept until they have ended), and
    the environment of each."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
