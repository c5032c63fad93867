"""What in a recipe is a place on somebody's disk: what a stranger must not choose, and what nobody else need know."""

import os
import re

# From the root, from a home folder, out of the current one, of Windows (a drive, or a share), or an address.
_PLACE = re.compile(r"[/\\~]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\\\]|[\w+.-]+://")


def is_place(text: str) -> bool:
    """Whether a text is a path by its form, leads out of its folder, is an address, or exists on this machine."""
    return _PLACE.match(text) is not None or ".." in re.split(r"[/\\]", text) or _exists(text)


def _exists(text: str) -> bool:
    try:
        return text != "" and os.path.lexists(text)
    except (OSError, ValueError):  # too long, or with a character that no name can hold
        return False
