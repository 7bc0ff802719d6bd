"""The engine's user errors."""

from foundation.errors import UserError


class AttachError(UserError):
    """The engine cannot score this model, or not in the way asked for; nothing was changed."""


class RowsError(UserError, RuntimeError):
    """The rows of the model's batch are not what the engine takes them for; a score would be of no sample."""
