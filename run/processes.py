"""The processes of a run, as torchrun starts them: one for each GPU, or several on CPUs."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from foundation.errors import ConfigError, UserError

if TYPE_CHECKING:
    from config_file import TrainingConfig

T = TypeVar("T")
# What torchrun sets for each process.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
OF_USERS = {"MASTER_ADDR", "MASTER_PORT"}  # batch scripts export them for themselves: no sign of a launcher
GROUPS = "GROUP_WORLD_SIZE"  # torchrun's, and no other launcher's
# How many tasks srun or an MPI launcher started in this step, and which of them this one is: Slurm; Open MPI;
# MPICH and what is made of it, of all machines and of this one; MVAPICH.
TASKS = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MPI_LOCALNRANKS": "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}


class SharedError(UserError):
    """A user error that every process raises with the same message: rank 0 alone reports it."""


@dataclass(frozen=True)
class World:
    """This process's place among those of the run, and what they tell each other. host: the group of all
    processes for what is not on a GPU. Every method is called by all processes, or none gets its answer."""

    rank: int
    size: int
    host: Any = None

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place on its device, without a device sync."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host)
        return int(value)

    def first(self, action: Callable[[], T]) -> T:
        """Run the action on rank 0 and return its result on all ranks.

        Raises:
            UserError: rank 0's own; on several processes a SharedError with its message, in all of them.
        """
        if self.size == 1:
            return action()
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = action()
            except UserError as error:
                outcome = SharedError(str(error))
        outcome = self.gather(outcome)[0]
        if isinstance(outcome, SharedError):
            raise outcome
        return cast(T, outcome)

    def every(self, action: Callable[[], T]) -> T:
        """Run the action on every rank and return the rank's own result.

        Raises:
            UserError: the action's own; on several processes a SharedError in all of them, with the message
                of the lowest rank that met one.
        """
        if self.size == 1:
            return action()
        outcome, error = None, None
        try:
            outcome = action()
        except UserError as own:
            error = str(own) if self.rank == 0 else f"process {self.rank}: {own}"
        errors = [each for each in self.gather(error) if each is not None]
        if errors:
            raise SharedError(errors[0])
        return cast(T, outcome)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values


@dataclass(frozen=True)
class Place:
    """This process's place among those that a launcher has started, on all machines and on this one. groups:
    how many launchers work together (torchrun's nodes)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    groups: int


def launched(environ: Mapping[str, str]) -> Place | None:
    """Return the place that the launcher's environment gives this process; None without a launcher.

    Raises:
        ConfigError: some of LAUNCHED are missing, or are not what a launcher sets.
    """
    given = [name for name in LAUNCHED if name in environ]
    if not set(given) - OF_USERS:
        return None
    if missing := [name for name in LAUNCHED if name not in environ]:
        raise ConfigError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set, but not {', '.join(missing)} "
            f"(seen: {', '.join(f'{name}={environ[name]}' for name in given)}): start several processes with "
            "torchrun, which sets all of them, or unset what is left of a launcher"
        )
    size, local_size = _whole(environ, "WORLD_SIZE", 1), _whole(environ, "LOCAL_WORLD_SIZE", 1)
    place = Place(
        rank=_whole(environ, "RANK", 0, size - 1),
        size=size,
        local_rank=_whole(environ, "LOCAL_RANK", 0, local_size - 1),
        local_size=local_size,
        groups=_whole(environ, GROUPS, 1) if GROUPS in environ else size,
    )
    if local_size > size:
        raise _malformed("LOCAL_WORLD_SIZE", str(local_size), f"at most WORLD_SIZE, {size}")
    _whole(environ, "MASTER_PORT", 1, 65535)
    if not environ["MASTER_ADDR"]:
        raise _malformed("MASTER_ADDR", "", "the name of a machine")
    return place


def _whole(environ: Mapping[str, str], name: str, at_least: int, at_most: int | None = None) -> int:
    text = environ[name]
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if number < at_least or (at_most is not None and number > at_most):
        upper = "or more" if at_most is None else f"to {at_most}"
        raise _malformed(name, text, f"a whole number, {at_least} {upper}")
    return number


def _malformed(name: str, text: str, must: str) -> ConfigError:
    return ConfigError(
        f"the environment variable {name} is {text!r}, and must be {must}: start several processes with "
        "torchrun, which sets it, or unset it and the rest of a launcher's variables"
    )


def first_of_machine(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process reports errors raised before the process group exists: local rank 0 alone does.

    Every process of a machine raises those errors, since all have one command line and environment. Of
    tasks that are in no group the first one reports. A process is silent only if a complete environment
    names another one that reports: left-over variables hide no message.
    """
    try:
        place = launched(environ)
    except ConfigError:
        return True
    if place is not None and (place.local_rank > 0 or place.groups > 1):
        return place.local_rank == 0
    return all(
        int(environ[rank]) == 0
        for _, tasks, rank in several_tasks(environ)
        if environ.get(rank, "").isdecimal() and int(environ[rank]) < tasks
    )


def several_tasks(environ: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Return the variables that say that srun or an MPI launcher started several tasks of this program in one
    step, each with its number and the name of the variable with the task's own place."""
    found = ((name, environ.get(name, ""), rank) for name, rank in TASKS.items())
    return [(name, int(text), rank) for name, text, rank in found if text.isdecimal() and int(text) > 1]


def check_tasks(place: Place | None, environ: Mapping[str, str]) -> None:
    """Check that the tasks of a job step know of each other.

    A launcher in each of them (torchrun --nnodes) that works with the others is as good as a group of the
    tasks themselves. SLURM_NTASKS does not matter: it is the allocation's, whatever is started in it.

    Raises:
        ConfigError: each of them would train the same run.
    """
    tasks = several_tasks(environ)
    if not tasks or (place is not None and place.groups > 1):
        return
    name, number, _ = tasks[0]
    raise ConfigError(
        f"{number} tasks of this program were started ({name}={number}), and do not know of each other: each "
        "would train the same run. Start one task for each machine, with --nnodes: srun "
        "--ntasks-per-node=1 (or mpirun --map-by ppr:1:node) ./Scripts/train.sh --nnodes N --nproc_per_node "
        "GPUS --rdzv_backend c10d --rdzv_endpoint HOST:PORT ...; or one task in all (--ntasks=1). If this "
        f"process has a run of its own, unset {name}"
    )


@contextmanager
def distributed_world(config: "TrainingConfig", environ: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Set up the run's processes, and tear them down: one process, or those that torchrun has started.

    They communicate with NCCL on GPUs and gloo on CPUs. The configuration's device is resolved.

    Raises:
        ConfigError: as `launched` and `check_tasks`; more processes on a machine than GPUs; --parallel fsdp with one
            process.
    """
    place = launched(environ)
    check_tasks(place, environ)
    if place is None or place.size == 1:
        if config.parallel == "fsdp":
            raise ConfigError(
                "--parallel fsdp divides a model among processes, and this is the only one: start several, "
                "./Scripts/train.sh --nproc_per_node 2, or leave it out"
            )
        yield World(0, 1)
        return
    if config.device == "cuda":
        processes, gpus = place.local_size, torch.cuda.device_count()
        if processes > gpus:
            raise ConfigError(f"this machine has {processes} processes for {gpus} GPU(s): start {gpus}")
        torch.cuda.set_device(place.local_rank)
    try:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        # beside NCCL, which would wait for the GPU to tell whether somebody pressed Ctrl-C
        host = dist.new_group(backend="gloo") if config.device == "cuda" else None
        yield World(dist.get_rank(), place.size, host)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
