"""The one plug-in mechanism: built-ins and those of other packages resolve the same way.

A name is looked up among the entry points of its group (`rewardsr.adapters`, ...); `module:Name` is imported, with the
current folder on the path. What a stranger's recipe names is resolved inside `registered_only`: there the second kind
does not exist, and nothing is imported for it.
"""

import importlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import AfterValidator

from rewardsr.errors import UserError, nearest, one_line
from rewardsr.options import Options

Kind = TypeVar("Kind")


class _Stranger(NamedTuple):
    source: str  # of the names, for messages
    given: Collection[str]  # names that the user gave beside them, who may name code


_stranger: ContextVar[_Stranger | None] = ContextVar("stranger", default=None)


class _Place(NamedTuple):
    module: str
    attributes: str
    what: str  # is to be found there, for messages
    folder: str | None = None  # to put on the path first


def names(kind: str) -> list[str]:
    """Registered names of a kind, sorted.

    Args:
        kind: "adapters", "trainers", "rewards", "degradations", "captioners" or "taggers".
    """
    return sorted(_registered(kind))


@contextmanager
def registered_only(source: str, given: Collection[str] = ()) -> Iterator[None]:
    """Inside, plug-ins resolve by registered names alone: what is registered, the user has installed.

    Args:
        source: where the names come from, for messages ("the run 'user/name'").
        given: names that the user gave beside them; these may be `module:Name`.
    """
    token = _stranger.set(_Stranger(source, given))
    try:
        yield
    finally:
        _stranger.reset(token)


def check(kind: str, name: str) -> None:
    """Refuse a name that `resolve` would; nothing is imported.

    Raises:
        UserError: nothing of that name; inside `registered_only`, nothing registered.
    """
    _find(kind, name)


def named(kind: str) -> AfterValidator:
    """Annotation of an option that names a plug-in: a name that `resolve` would refuse is refused with the options."""

    def checked(name: str) -> str:
        check(kind, name)
        return name

    return AfterValidator(checked)


def resolve(kind: str, name: str) -> Any:
    """The object behind a registered name or a `module:Name` reference.

    Raises:
        UserError: nothing of that name, it does not import, or it names code inside `registered_only`.
    """
    return _import(_find(kind, name))


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
    group = f"rewardsr.{kind}"
    try:
        found = list(entry_points(group=group))
    except Exception:  # one package with damaged metadata is enough: take them one by one
        found = [point for package in distributions() for point in _points(package) if point.group == group]
    return {point.name: point for point in found}


def _points(package: Distribution) -> list[EntryPoint]:
    try:
        return list(package.entry_points)
    except Exception:  # whatever its file makes the parser stumble over
        return []


def _find(kind: str, name: str) -> _Place:
    registered = _registered(kind)
    what = f"{kind.removesuffix('s')} '{name}'"
    if name in registered:
        point = registered[name]
        package = f" of the package {point.dist.name}" if point.dist else ""
        try:
            return _Place(point.module, point.attr, f"{what}{package}")
        except Exception as error:  # of an entry point that does not parse
            raise UserError(f"{what}{package}: '{point.value}' is not of the form module:Name") from error
    stranger = _stranger.get()
    if ":" not in name:
        raise UserError(f"unknown {what}: {nearest(name, sorted(registered))} (or give module:Name)")
    if stranger is not None and name not in stranger.given:
        raise UserError(
            f"{stranger.source} names code, {what}, which a run from the Hub may not: pull it, look at its "
            "recipe.yaml, and give --adapter, --base, --option and --lora yourself"
        )
    module, _, attributes = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attributes.split("."))):
        raise UserError(f"{what}: expected module:Name, with the names of a module and of something in it")
    return _Place(module, attributes, what, str(Path.cwd()))


def _import(place: _Place) -> Any:
    if place.folder is not None and place.folder not in sys.path:
        sys.path.insert(0, place.folder)
    try:
        found: Any = importlib.import_module(place.module)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
        raise UserError(f"{place.what}: importing {place.module} failed: {one_line(error)}") from error
    for attribute in place.attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            raise UserError(f"{place.what}: module {place.module} has no '{place.attributes}'") from error
        except Exception as error:  # of a module that imports its parts when they are asked for
            raise UserError(f"{place.what}: {place.module} does not give it: {one_line(error)}") from error
    return found
