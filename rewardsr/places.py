"""Places on somebody's disk: what a stranger's recipe must not choose, and what nobody else need know."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

# A path by its form: from the root, from a home folder, of Windows (a drive, or a share), or beside the current folder.
_PATH = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|\.{1,2}([/\\]|$)")
_ADDRESS = re.compile(r"[\w+.-]+://")
# One of several parts within a text; no part of an address, nor "and/or".
_WITHIN = re.compile(r"(?<![\w:/\\.~])(?:~\w*|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+(?P<last>[^\s/\\'\",;)]*)")

FOLDERS = {"train", "validation", "path", "output"}  # keys of a recipe that hold a path, whatever its form
PROSE = {"prompts", "prompt", "prompt_suffix", "negative_prompt", "template"}  # and keys that hold words


def is_place(text: str) -> bool:
    """Whether a text is a path by its form, leads out of its folder, is an address, or exists on this machine."""
    led_out = ".." in re.split(r"[/\\]", text)
    return led_out or _PATH.match(text) is not None or _ADDRESS.match(text) is not None or _exists(text)


def without_places(value: Any, note: Callable[[str, str, str], None], where: str = "", here: bool = False) -> Any:
    """Plain data with every path in it shortened to its last part, which tells nobody whose disk it was on.

    Args:
        value: texts, numbers, lists and mappings.
        note: is told of each that changes: where, before, after.
        where: dotted keys that lead to the value.
        here: whether relative paths of several parts count, too, if they exist on this machine.
    """
    if isinstance(value, Mapping):
        return {
            _shortened(key, "", False) if isinstance(key, str) else key: without_places(
                entry, note, f"{where}.{key}".lstrip("."), here
            )
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_places(entry, note, f"{where}.{place}".lstrip("."), here) for place, entry in enumerate(value)]
    if not isinstance(value, str):
        return value
    key = next((part for part in reversed(where.split(".")) if not part.isdecimal()), "")  # of a list, its own
    after = " + ".join(_shortened(part, key, here) for part in value.split(" + "))
    if after != value:
        note(where, value, after)
    return after


def _shortened(text: str, key: str, here: bool) -> str:
    if key not in PROSE:
        several = "/" in text or "\\" in text
        if _PATH.match(text) or (several and (key in FOLDERS or (here and _exists(text)))):
            return _last_part(text)
    return _WITHIN.sub(lambda found: found["last"] or _last_part(found[0]), text)


def _last_part(text: str) -> str:
    if os.path.normpath(os.path.expanduser(text)) == os.path.normpath(os.path.expanduser("~")):
        return "home"  # whose name is the user's
    name = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lstrip("~")
    return "here" if name in ("", ".", "..") else name


def _exists(text: str) -> bool:
    try:
        return text != "" and os.path.lexists(text)
    except (OSError, ValueError):  # too long, or with a character that no name can hold
        return False
