"""Rewards by name: built-in, from another package, `module:Name`, or a metric of pyiqa.

Rule of precedence: registered names come first, so `psnr` is ours (luma, as papers report it) and not pyiqa's;
`iqa:psnr` is always pyiqa's. What is no registered name is looked up among pyiqa's ids.
"""

import inspect
from typing import Any, NamedTuple

import torch

from rewardsr import plugins
from rewardsr.errors import UserError, nearest, one_line, shortened
from rewardsr.options import Options, parse
from rewardsr.progress import waiting
from rewardsr.rewards.base import Reward
from rewardsr.rewards.iqa import IQA, LICENCE, metrics

IQA_PREFIX = "iqa:"
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
        options: of the reward; its class declares them as `Options` (see `rewardsr.rewards.base`).

    Raises:
        UserError: unknown name or option, or the reward cannot be built.
    """
    with waiting(f"loading reward {name}"):
        return _built(name, options)


def _built(name: str, options: dict[str, Any]) -> Reward:
    if name.startswith(IQA_PREFIX):
        return _metric(name.removeprefix(IQA_PREFIX), options)
    if is_plugin(name):
        return _make(name, plugins.resolve("rewards", name), options)
    ids = _pyiqa_ids()
    if name in ids:
        return _metric(name, options)
    registered = plugins.names("rewards")
    hint = nearest(name, [*registered, *ids], f"known: {', '.join(registered)}")
    more = "a pyiqa id" if ids else "with pyiqa installed, one of its ids"
    raise UserError(f"unknown reward '{name}': {hint} (or give module:Name, or {more})")


def is_plugin(name: str) -> bool:
    """Whether a reward of this name is resolved as a plug-in, and not as a metric of pyiqa."""
    return not name.startswith(IQA_PREFIX) and (":" in name or name in plugins.names("rewards"))


def known() -> list[Known]:
    """Registered rewards, sorted by name, without building them; pyiqa's metrics are not among them.

    A reward of another package that does not import is listed with the reason as its licence: a table is no place to
    stop at a stranger's mistake.
    """
    rows = []
    for name in plugins.names("rewards"):
        try:
            made = plugins.resolve("rewards", name)
            made = made if hasattr(made, "kind") else made()  # a factory knows only by making
            facts = (bool(made.needs_hq), bool(made.differentiable), str(made.licence))
            rows.append(Known(name, str(made.kind), *facts))
        except (Exception, SystemExit) as error:
            rows.append(Known(name, "?", False, False, f"does not load: {shortened(str(error), 200)}"))
    return rows


def licence_of(name: str) -> str:
    """Licence of a reward by its name, without building it; "unknown" where it does not say."""
    if is_plugin(name):
        try:
            return str(getattr(plugins.resolve("rewards", name), "licence", "unknown"))
        except UserError:  # of a package that is not here any more
            return "unknown"
    return LICENCE


def _metric(metric: str, options: dict[str, Any]) -> Reward:
    return IQA(metric, parse(IQA.Options, options, f"options of metric '{metric}'"))


def _pyiqa_ids() -> list[str]:
    try:
        return list(metrics())
    except UserError:  # not installed: then there are none
        return []


def _make(name: str, made: Any, options: dict[str, Any]) -> Reward:
    """Call a class or factory of the group `rewards`, everything checked first."""
    if not callable(made) or (not inspect.isclass(made) and isinstance(made, Reward)):
        raise UserError(
            f"reward '{name}': expected a class or a function that makes a reward, got {type(made).__name__}"
        )
    declared = getattr(made, "Options", None)
    if declared is not None and not (inspect.isclass(declared) and issubclass(declared, Options)):
        raise UserError(f"reward '{name}': declare its Options as a subclass of rewardsr.Options")
    taken = _parameters(made)
    if len(taken) != (declared is not None):
        raise UserError(
            f"reward '{name}' takes the arguments ({', '.join(taken)}): expected none, or one, whose class the reward "
            "declares as Options, a subclass of rewardsr.Options"
        )
    given = parse(declared or Options, options, f"options of reward '{name}'")
    try:
        reward: Any = made(*((given,) if declared else ()))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a reward may be a stranger's
        raise UserError(f"reward '{name}' cannot be made: {one_line(error)}") from error
    return _checked(name, reward)


def _parameters(made: Any) -> list[str]:
    try:
        parameters = inspect.signature(made).parameters.values()
    except ValueError:  # written in C
        return []
    return [entry.name for entry in parameters if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]


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
