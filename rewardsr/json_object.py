"""JSON objects of other people's making: files and headers that may hold anything."""

import json
from pathlib import Path
from typing import Any, NoReturn

from rewardsr.errors import UserError, one_line
from rewardsr.storage import read_text

LONGEST_NAME = 300  # of a setting or a tensor; messages name them
LARGEST = 2**24  # bytes of a file; the index of a large network in shards has a million


def parse_object(text: str, says: str) -> dict[str, Any]:
    """The object in a JSON text.

    Args:
        text: with finite numbers; NaN and Infinity are no JSON.
        says: how a message about it begins ("'x' is damaged").

    Raises:
        UserError: no JSON, no object, or nested too deeply to be read.
    """
    try:
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{says}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{says}: expected settings by name, found {type(content).__name__}")
    for name in content:
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"{says}: {name[:LONGEST_NAME]!r} is no name")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as `parse_object`, or it cannot be read.
    """
    return parse_object(read_text(path, f"'{path}' is missing or damaged", LARGEST), f"'{path}' is damaged")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
