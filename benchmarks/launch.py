"""Start runs by command lines, or by forks of a process that has already imported the program.

A fork saves the five seconds of imports that a run of one second would wait for.
"""

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
# Preloading works if the working directory is ROOT; otherwise the run imports the modules.
FORKS.set_forkserver_preload(["main", "pandas"])


def flags_of(settings: Mapping[str, object]) -> list[str]:
    """Return settings as flags of the command line. True becomes a switch without a value."""
    return [part for name, value in settings.items() for part in _flag(name, value)]


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def torchrun(*arguments: object) -> list[str]:
    """Return the command that runs a script, or a module after "-m", in two processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", *launcher, *map(str, arguments)]


def fork(
    action: Callable[..., int | None], *arguments: object, output: Path, environment: Mapping[str, str]
) -> ForkServerProcess:
    """Start action(*arguments) in a process with one thread, which ends with this one at the latest.

    Args:
        action: an importable function; it returns the exit status.
        output: standard output and error go to {output}.out and {output}.err.
        environment: added to the process's.
    """
    process = FORKS.Process(target=_forked, args=(action, arguments, output, environment), daemon=True)
    process.start()
    return process


def _forked(
    action: Callable[..., int | None],
    arguments: tuple[object, ...],
    output: Path,
    environment: Mapping[str, str],
) -> None:
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        with Path(f"{output}.{kind}").open("w") as file:
            stream.flush()
            os.dup2(file.fileno(), {"out": 1, "err": 2}[kind])
    # "fork" is the command line's default. With "forkserver" the progress bar's lock would outlive a process
    # that is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(action(*arguments))


def world_of(size: int) -> tuple[TCPStore, list[dict[str, str]]]:
    """Return the store through which the processes of a run meet, and each one's environment, as of torchrun.

    Keep the store until the processes have ended.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
