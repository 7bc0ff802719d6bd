"""The error of runs that cannot give what was asked for."""

from foundation.errors import UserError


class AttributionError(UserError):
    """The runs cannot give what was asked for; the message names what was seen and what to do."""
