"""The processes of a run, as torchrun starts them: one for each GPU, or several on CPUs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from config_file import ConfigError, TrainingConfig
from foundation.errors import UserError

T = TypeVar("T")
# What torchrun sets.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


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
        """For all processes."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place and on the tensor's device, without waiting for it there."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
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
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values


def first_of_machine() -> bool:
    """Whether this process tells what all of its machine meet before they know of each other: they have one
    command line and one environment."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def distributed_world(config: TrainingConfig) -> Iterator[World]:
    """The set-up and tear-down of the run's processes, for a configuration whose device is resolved: one
    process, or those that torchrun has started, with NCCL on GPUs and gloo on CPUs.

    Raises ConfigError if they were started in a way that is not torchrun's, or more of them on a machine than
    it has GPUs, and for --parallel fsdp with one process.
    """
    given = [name for name in LAUNCHED if name in os.environ]
    if "RANK" not in given and os.environ.get("WORLD_SIZE", "1") == "1":
        given = []
    if given and len(given) < len(LAUNCHED):
        missing = ", ".join(name for name in LAUNCHED if name not in given)
        raise ConfigError(
            f"{given[0]} is set, but not {missing}: start several processes with torchrun, or unset it"
        )
    size = int(os.environ["WORLD_SIZE"]) if given else 1
    if size == 1:
        if config.parallel == "fsdp":
            raise ConfigError(
                "--parallel fsdp divides a model among processes, and this is the only one: start several, "
                "./Scripts/train.sh --nproc_per_node 2, or leave it out"
            )
        yield World(0, 1)
        return
    if config.device == "cuda":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise ConfigError(f"this machine has {processes} processes for {gpus} GPU(s): start {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        # beside NCCL, which would wait for the GPU to tell whether somebody pressed Ctrl-C
        host = dist.new_group(backend="gloo") if config.device == "cuda" else None
        yield World(dist.get_rank(), size, host)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
