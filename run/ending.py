"""How a program ends: its exit status, and who reports its error."""

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch.distributed as dist

from foundation.errors import UserError
from run.finite_guard import NonFiniteLoss
from run.processes import SharedError, first_of_machine
from run.signals import Interrupted

OK, NON_FINITE, WRONG_USE = 0, 1, 2
logger = logging.getLogger(__name__)


def exit_status(program: str, action: Callable[[ExitStack], int]) -> int:
    """Run the action with an ExitStack for its resources, and return the exit status.

    Returns:
        what the action returns; 1 for a loss that is not finite; 2 after a user error, which is printed in one
        line; 128 + the signal's number after a signal that came before there was anything to save.
    """
    try:
        with ExitStack() as resources:
            try:
                return action(resources)
            except UserError as error:
                # Before the process group exists, all processes of a machine raise the same error.
                own = dist.is_initialized() and not isinstance(error, SharedError)
                if own or first_of_machine():
                    print(f"{program}: error: {error}", file=sys.stderr)
                return WRONG_USE
            except NonFiniteLoss as error:
                logger.error("%s: error: %s", program, error)
                return NON_FINITE
    except KeyboardInterrupt as error:
        return stopped_by(error)


def stopped_by(error: KeyboardInterrupt) -> int:
    """Return the exit status after a signal, as a shell reports it."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
