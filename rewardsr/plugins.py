"""The one plug-in mechanism: built-ins and those of other packages resolve the same way.

A name is looked up among the entry points of its group (`rewardsr.adapters`, ...); `module:Name` is imported, with the
current folder on the path.
"""

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from rewardsr.errors import UserError, nearest
from rewardsr.options import Options

Kind = TypeVar("Kind")


def names(kind: str) -> list[str]:
    """Registered names of a kind, sorted.

    Args:
        kind: "adapters", "trainers", "rewards", "degradations", "captioners" or "taggers".
    """
    return sorted(_registered(kind))


def resolve(kind: str, name: str) -> Any:
    """The object behind a registered name or a `module:Name` reference.

    Raises:
        UserError: nothing of that name, or it does not import.
    """
    registered = _registered(kind)
    what = f"{kind.removesuffix('s')} '{name}'"
    if name in registered:
        point = registered[name]
        package = f" of the package {point.dist.name}" if point.dist else ""
        return _import(point.module, point.attr, f"{what}{package}")
    if ":" in name:
        folder = str(Path.cwd())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        module, _, attribute = name.partition(":")
        return _import(module, attribute, what)
    raise UserError(f"unknown {what}: {nearest(name, sorted(registered))} (or give module:Name)")


def resolve_class(kind: str, name: str, base: type[Kind]) -> type[Kind]:
    """As `resolve`, for the plug-ins that are classes and declare their options.

    Raises:
        UserError: as `resolve`; or it is no subclass of `base`, or its `Options` none of `rewardsr.Options`.
    """
    found = resolve(kind, name)
    what = f"{kind.removesuffix('s')} '{name}'"
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{what}: expected a subclass of {base.__module__}.{base.__name__}, got {found!r}")
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise UserError(f"{what}: its Options must be a subclass of rewardsr.Options, got {options!r}")
    return found


def _registered(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"rewardsr.{kind}")}


def _import(module: str, attributes: str, what: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what}: importing {module} failed: {reason}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise UserError(f"{what}: module {module} has no '{attributes}'")
        found = getattr(found, attribute)
    return found
