"""The engine's user errors."""

from foundation.errors import UserError


class AttachError(UserError):
    """The engine cannot score this model, or not in the way asked for; nothing was changed."""
