"""The one plug-in mechanism: built-in and foreign adapters, rewards and trainers resolve the same way.

A name is looked up among the entry points of its group (`rewardsr.adapters`, `rewardsr.rewards`,
`rewardsr.trainers`); `module:Name` is imported, with the current folder on the path.
"""

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from rewardsr.errors import UserError, nearest


def names(kind: str) -> list[str]:
    """Registered names of a kind ("adapters", "rewards", "trainers"), sorted."""
    return sorted(_registered(kind))


def resolve(kind: str, name: str) -> Any:
    """The object behind a registered name or a `module:Name` reference.

    Raises:
        UserError: nothing of that name, or it does not import.
    """
    registered = _registered(kind)
    if name in registered:
        return registered[name].load()
    if ":" in name:
        return _import(kind, name)
    hint = nearest(name, sorted(registered))
    raise UserError(f"unknown {kind.removesuffix('s')} '{name}': {hint} (or give module:Name)")


def _registered(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"rewardsr.{kind}")}


def _import(kind: str, reference: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise UserError(f"{kind.removesuffix('s')} '{reference}': importing {module_name} failed: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{kind.removesuffix('s')} '{reference}': module {module_name} has no '{attribute}'")
    return getattr(module, attribute)
