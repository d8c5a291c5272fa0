"""The one error of this room."""

from __future__ import annotations


class ResourceModelError(ValueError):
    """A prediction cannot be made; the message names what is missing, and what to do about it."""
