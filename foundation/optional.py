"""Packages that only some installations have."""

from importlib import import_module
from typing import Any

from foundation.errors import UserError


def optional(package: str, extra: str) -> Any:
    """Import a package that an extra of this project installs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there, and lacks one of its own
        raise UserError(
            f"{package} is not installed: pip install 'ghost-engines[{extra}]', or requirements.txt in a checkout"
        ) from error
