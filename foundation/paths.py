"""Paths as people write them: `~` is expanded here, because a shell expands it neither in `--flag=~/x` nor in
a quoted variable."""

import argparse
import os
from pathlib import Path

from foundation.errors import UserError


def expand_home(path: str, where: str) -> str:
    """Return the path with a leading `~` or `~user` replaced by that home folder.

    Args:
        where: the flag or the environment variable, for the message.

    Raises:
        UserError: there is no such user, or no home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = expanded.partition("/")[0]
        raise UserError(
            f"{where} {path}: there is no home folder for {name}; a folder of that name is written ./{name}"
        )
    return expanded


def path_argument(text: str) -> Path:
    """Read a path from the command line: the `type` of an argparse argument, with `~` expanded."""
    try:
        return Path(expand_home(text, "the path"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
