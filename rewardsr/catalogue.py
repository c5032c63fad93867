"""What there is to choose from: plug-ins by kind, and the options of each, as lists and as Markdown."""

from typing import Any, NamedTuple

from rewardsr.errors import UserError
from rewardsr.options import Options, describe
from rewardsr.plugins import names, resolve
from rewardsr.rewards import IQA_PREFIX, is_plugin
from rewardsr.rewards.iqa import IQA, metrics

KINDS = ("adapters", "trainers", "rewards", "degradations", "captioners")


class Entry(NamedTuple):
    """A registered plug-in: its name, and the first line of its documentation."""

    name: str
    about: str


def entries(kind: str) -> list[Entry]:
    """Every registered plug-in of a kind; of one that does not load, why."""
    found = []
    for name in names(kind):
        try:
            text = str(resolve(kind, name).__doc__ or "").strip()
        except UserError as error:  # of another package: a list is no place to stop at a stranger's mistake
            text = f"does not load: {error}"
        found.append(Entry(name, text.partition("\n")[0]))
    return found


def options_of(kind: str, name: str) -> type[Options]:
    """The options that a plug-in declares; those of `Options` itself, none, where it declares none.

    Args:
        kind: one of `KINDS`.
        name: registered name or `module:Name`; of rewards a pyiqa id as well.

    Raises:
        UserError: unknown name (the nearest is named), or its `Options` are none of `rewardsr.Options`.
    """
    if kind == "rewards" and not is_plugin(name):
        _check_metric(name.removeprefix(IQA_PREFIX), name)
        return IQA.Options
    found: Any = getattr(resolve(kind, name), "Options", Options)
    if not (isinstance(found, type) and issubclass(found, Options)):
        raise UserError(f"{kind.removesuffix('s')} '{name}': its Options must be a subclass of rewardsr.Options")
    return found


def _check_metric(metric: str, name: str) -> None:
    if metric not in metrics():
        resolve("rewards", name)  # which names the nearest


def listed(model: type[Options]) -> list[str]:
    """The options of a model, a line each."""
    lines = []
    for option in describe(model):
        bounds = f", {option.bounds}" if option.bounds else ""
        lines.append(f"{option.name} ({option.type}{bounds}, default {option.default}): {option.description}")
    return lines


def table(model: type[Options]) -> str:
    """The options of a model as a Markdown table."""
    rows = [("option", "type", "default", "meaning"), ("---",) * 4]
    rows += [(f"`{o.name}`", o.type, f"`{o.default}`", o.description) for o in describe(model)]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)
