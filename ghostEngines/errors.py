"""The engine's user errors."""

from foundation.errors import UserError


class AttachError(UserError):
    """The engine cannot score this model with these options. Nothing was changed."""


class RowsError(UserError, RuntimeError):
    """The rows depend on each other or are not in order: a score would not belong to a single sample."""
