"""Parse the arguments that all commands of this package share, and turn errors into exit statuses."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import get_args

from attribution.completeness import Window
from attribution.database import MEMORY_LIMIT, Normalise
from attribution.errors import AttributionError
from attribution.scored_run import ScoredRun
from attribution.screen import printable
from foundation.arguments import ArgumentParser
from foundation.errors import UserError
from foundation.paths import path_argument


@dataclass(frozen=True)
class RunOptions:
    """The shared arguments, parsed."""

    runs: tuple[ScoredRun, ...]
    normalise: Normalise
    steps: Window
    pile_data_dir: Path | None
    memory_limit: str


def make_argument_parser(module: str, description: str, *, several: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the shared arguments.

    Args:
        module: the name after `python -m`.
        several: whether the command takes more than one run.
    """
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
        "their sum; without it the first steps, in which the loss falls fast, count most [none]",
    )
    parser.add_argument(
        "--steps", metavar="FIRST:LAST", default=":", help="only these steps, both included [all: ':']"
    )
    parser.add_argument(
        "--pile_data_dir",
        type=path_argument,
        metavar="FOLDER",
        help="of the training shards, records or images [as in the run]",
    )
    parser.add_argument(
        "--memory_limit",
        default=MEMORY_LIMIT,
        help=f"of the database, which spills to the disk beyond it [{MEMORY_LIMIT}]",
    )
    return parser


def read_options(arguments: argparse.Namespace) -> RunOptions:
    """Open the runs and parse the steps. Raises AttributionError and ScoreError."""
    return RunOptions(
        runs=tuple(map(ScoredRun.open, arguments.result_dirs)),
        normalise=arguments.normalise,
        steps=parse_steps(arguments.steps),
        pile_data_dir=arguments.pile_data_dir,
        memory_limit=arguments.memory_limit,
    )


def parse_steps(text: str) -> Window:
    """Parse "100:200" into (100, 200); an open end is None.

    Raises:
        AttributionError: the text is not FIRST:LAST, or ends before it begins.
    """
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
    """Run `command` and return its exit status.

    Returns:
        0; 2 after a UserError, which is printed in one line; 130 after Ctrl-C; 141 if the output's reader has
        closed it.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    assert isinstance(sys.stdout, TextIOWrapper)
    sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack letters of the training texts
    try:
        command(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`; the interpreter flushes stdout again at its end, to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"{module}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
