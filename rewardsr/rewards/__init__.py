"""Rewards by name: built-in, from another package, `module:Name`, or a metric of pyiqa.

Rule of precedence: registered names come first, so `psnr` is ours (luma, as papers report it) and not pyiqa's;
`iqa:psnr` is always pyiqa's. What is no registered name is looked up among pyiqa's ids.
"""

import difflib
import inspect
from typing import Any, NamedTuple

from rewardsr import plugins
from rewardsr.errors import UserError
from rewardsr.rewards.base import Reward

IQA_PREFIX = "iqa:"
IQA_NOTE = (
    "any metric of pyiqa is a reward as well: write its id (musiq, maniqa, lpips, ...), or iqa:ID where a name is taken"
)
KINDS = ("fidelity", "detail")


class Known(NamedTuple):
    """One line of the table of rewards; fields as of `Reward`."""

    name: str
    kind: str
    needs_hq: bool
    differentiable: bool
    licence: str


def build(name: str, **options: Any) -> Reward:
    """Make a reward.

    Args:
        name: a registered name ("psnr", "detail"), `module:Name` of a class or factory, a pyiqa id ("musiq"), or
            `iqa:` and a pyiqa id.
        options: arguments of the class or factory.

    Raises:
        UserError: unknown name or option, or the reward cannot be built.
    """
    if name.startswith(IQA_PREFIX):
        return _iqa(name.removeprefix(IQA_PREFIX), options)
    if ":" in name or name in plugins.names("rewards"):
        return _checked(name, _call(name, plugins.resolve("rewards", name), options))
    ids = _pyiqa_ids()
    if name in ids:
        return _iqa(name, options)
    registered = plugins.names("rewards")
    close = difflib.get_close_matches(name, {*registered, *ids}, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(registered)}"
    more = "a pyiqa id" if ids else "with pyiqa installed, one of its ids"
    raise UserError(f"unknown reward '{name}': {hint} (or give module:Name, or {more})")


def known() -> list[Known]:
    """Registered rewards, sorted by name, without building them; `IQA_NOTE` says how to reach pyiqa's.

    A reward of another package that does not import is listed with the reason as its licence: a table is no place to
    stop at a stranger's mistake.
    """
    rows = []
    for name in plugins.names("rewards"):
        try:
            made = plugins.resolve("rewards", name)
            made = made if hasattr(made, "kind") else made()  # a factory knows only by making
            rows.append(Known(name, made.kind, made.needs_hq, made.differentiable, made.licence))
        except Exception as error:
            rows.append(Known(name, "?", False, False, f"does not load: {' '.join(str(error).split())[:80]}"))
    return rows


def licence_of(name: str) -> str:
    """Licence of a reward by its name, without building it; "unknown" where it does not say."""
    if (":" in name and not name.startswith(IQA_PREFIX)) or name in plugins.names("rewards"):
        try:
            return str(getattr(plugins.resolve("rewards", name), "licence", "unknown"))
        except UserError:  # of a package that is not here any more
            return "unknown"
    from rewardsr.rewards.iqa import LICENCE

    return LICENCE


def _iqa(metric: str, options: dict[str, Any]) -> Reward:
    from rewardsr.rewards.iqa import IQA

    return _call(f"{metric}", IQA, {"metric": metric, **options})


def _pyiqa_ids() -> list[str]:
    from rewardsr.rewards.iqa import metrics

    try:
        return list(metrics())
    except UserError:  # not installed: then there are none
        return []


def _call(name: str, made: Any, options: dict[str, Any]) -> Any:
    """Call a class or factory, options checked first, for its own TypeErrors may be bugs."""
    if not callable(made) or (not inspect.isclass(made) and isinstance(made, Reward)):
        raise UserError(
            f"reward '{name}': expected a class or a function that makes a reward, got {type(made).__name__}"
        )
    try:
        signature = inspect.signature(made)
    except (TypeError, ValueError):  # written in C, say: nothing to check against
        return made(**options)
    parameters = signature.parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        _refuse_unknown(name, options, [parameter.name for parameter in parameters])
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UserError(f"reward '{name}': {error}") from error
    return made(**options)


def _refuse_unknown(name: str, options: dict[str, Any], allowed: list[str]) -> None:
    for option in options:
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(allowed) or 'none'}"
            raise UserError(f"reward '{name}' has no option '{option}': {hint}")


def _checked(name: str, reward: Any) -> Reward:
    missing = [
        field for field in ("name", "kind", "needs_hq", "differentiable", "licence") if not hasattr(reward, field)
    ]
    if missing or not callable(reward):
        lacks = ", ".join(missing) or "__call__(sr, batch)"
        raise UserError(f"reward '{name}': what it makes lacks {lacks} (see rewardsr.rewards.base.Reward)")
    if reward.kind not in KINDS:
        raise UserError(f"reward '{name}': kind must be one of {', '.join(KINDS)}, not '{reward.kind}'")
    made: Reward = reward
    return made
