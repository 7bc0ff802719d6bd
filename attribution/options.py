"""What the commands of this package share: the arguments that say which runs and how, and how they end."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from attribution.completeness import Window
from attribution.database import MEMORY_LIMIT, Normalise
from attribution.scored_run import AttributionError, ScoredRun
from attribution.screen import printable
from foundation.arguments import ArgumentParser
from foundation.errors import UserError
from foundation.paths import path_argument


@dataclass(frozen=True)
class RunOptions:
    """The shared arguments, as functions take them."""

    runs: tuple[ScoredRun, ...]
    normalise: Normalise
    steps: Window
    pile_data_dir: Path | None
    memory_limit: str


def argument_parser(module: str, description: str, *, several: bool = True) -> argparse.ArgumentParser:
    """A parser with the shared arguments. module: as after `python -m`; several: whether the command takes
    more than one run."""
    parser = ArgumentParser(f"python -m {module}", description=description, allow_abbrev=False)
    parser.add_argument(
        "result_dirs",
        metavar="RESULT_DIR",
        nargs="+" if several else 1,
        type=path_argument,
        help="folder of a run with scores"
        + ("; values are the mean over several of them" if several else ""),
    )
    parser.add_argument(
        "--normalise",
        choices=get_args(Normalise),
        default="none",
        help="divide each step's values by the sum of their absolute values, or by the absolute value of "
        "their sum: otherwise the first steps, in which the loss falls fast, count most [none]",
    )
    parser.add_argument(
        "--steps", metavar="FIRST:LAST", default=":", help="only these steps, both included [all: ':']"
    )
    parser.add_argument(
        "--pile_data_dir", type=path_argument, metavar="FOLDER", help="of the training shards [as in the run]"
    )
    parser.add_argument(
        "--memory_limit",
        default=MEMORY_LIMIT,
        help=f"of the database; what does not fit goes to the disk [{MEMORY_LIMIT}]",
    )
    return parser


def run_options(arguments: argparse.Namespace) -> RunOptions:
    """Opens the runs. Raises AttributionError and ScoreError."""
    return RunOptions(
        runs=tuple(map(ScoredRun.open, arguments.result_dirs)),
        normalise=arguments.normalise,
        steps=parse_steps(arguments.steps),
        pile_data_dir=arguments.pile_data_dir,
        memory_limit=arguments.memory_limit,
    )


def parse_steps(text: str) -> Window:
    """(100, 200) of "100:200"; None for a side that is left open. AttributionError for anything else."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise AttributionError(
            f"--steps {text!r}: give FIRST:LAST, both included, as in 100:199, 100: or :199"
        )
    first, last = (int(number) if number else None for number in match.groups())
    if first is not None and last is not None and first > last:
        raise AttributionError(f"--steps {text}: ends before it begins")
    return first, last


def run_command(module: str, command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs `command`; returns the exit status: 0; 2 after an error of the user's making, or of the disk,
    which is said in a line; 141 if nobody reads the output any more; 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.reconfigure(errors="replace")  # texts of any language
    try:
        command(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # head has seen enough; what is left goes nowhere, also at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"{module}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
