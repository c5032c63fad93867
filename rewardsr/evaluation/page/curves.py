"""Curves of a page: the metrics of several runs over their steps, sorted into charts with what their axis means."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from rewardsr.evaluation.page.content import RunView

MOST_POINTS = 300  # of a curve; of more steps the mean of as many at a time is drawn
HELD_OUT, SAMPLES, LEARNING, MACHINE = "Held-out images", "Samples of the steps", "Learning", "Machine"
GROUPS = {
    HELD_OUT: (
        "What should rise: mean of the tuned pipeline over the held-out images, higher is better. Dashed: the base; "
        "bands: 95 % interval of the distance to it."
    ),
    SAMPLES: "What the steps learn from; these images change from step to step.",
    LEARNING: "The optimiser's side.",
    MACHINE: "What a step costs.",
}

# What a metric of a step is, by the beginning of its name; the longest one that fits counts.
MEANINGS = {
    "loss": (LEARNING, "what the optimiser lowers; its level says little of quality"),
    "loss/": (LEARNING, "one term of the loss"),
    "implicit_accuracy": (LEARNING, "share of groups in which the policy prefers what the rewards do; 0.5 is chance"),
    "distance": (LEARNING, "mean squared distance between the predictions of policy and reference"),
    "grad_norm": (LEARNING, "length of the gradient before clipping"),
    "learning_rate": (LEARNING, "of the optimiser"),
    "skipped": (LEARNING, "updates left out so far, as they were not finite"),
    "reference/": (SAMPLES, "score of what the frozen base makes of the step's images: it is not meant to rise"),
    "spread/": (SAMPLES, "standard deviation of the score within a group: what there is to choose from"),
    "group/pixel_std": (SAMPLES, "how much the outputs of a group differ, in [0, 1]"),
    "group/tied": (SAMPLES, "share of groups whose outputs score the same, from which nothing is learnt"),
    "share/": (SAMPLES, "share of the step's images in this window of the sampler"),
    "seconds": (MACHINE, "of a step"),
}


def charts(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    """Plain data for `curves.js` and `plots`, a chart a metric.

    Returns:
        Of each chart "title", "group" (a key of `GROUPS`), "meaning" of its vertical axis, and "series": of each
        "run" (its place among the runs), "points" [step, value] or [step, value, low, high], "every" (steps that a
        point averages), and in validations "base", the score of the base.
    """
    found: dict[str, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for title, series in _series(run).items():
            group, meaning = _meaning(title, run)
            chart = found.setdefault(title, {"title": title, "group": group, "meaning": meaning, "series": []})
            chart["series"].append({"run": place, **series})
    return sorted(found.values(), key=lambda chart: list(GROUPS).index(chart["group"]))


def _series(run: RunView) -> dict[str, dict[str, Any]]:
    """The curves of a run by title; validations first."""
    validated: dict[str, dict[str, Any]] = {}
    logged: dict[str, list[list[float]]] = {}
    for line in run.steps:
        step = line["step"]
        for name, summary in _mapping(line.get("validation")).items():
            entry = _validated(step, _mapping(summary))
            if entry is not None:
                point, base = entry
                series = validated.setdefault(f"{name} (validation)", {"points": [], "every": 1, "base": base})
                series["points"].append(point)
        for name, value in _numbers(line):
            logged.setdefault(name, []).append([step, value])
    thinned = {name: _thinned(points) for name, points in logged.items()}
    return validated | {name: {"points": points, "every": every} for name, (points, every) in thinned.items()}


def _validated(step: int, summary: Mapping[str, Any]) -> tuple[list[float], float] | None:
    """[step, tuned mean] with the ends of the interval of its distance to the base, and the base's mean."""
    tuned, base = summary.get("tuned_mean"), summary.get("base_mean")
    if not (_is_number(tuned) and _is_number(base)):
        return None
    ends = summary.get("interval") or ()
    band = [_brief(base + end) for end in ends if _is_number(end)]
    return [step, _brief(tuned), *(band if len(band) == 2 else ())], _brief(base)


def _numbers(line: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping) and name != "validation":
            yield from _numbers(value, f"{prefix}{name}/")
        elif _is_number(value) and (prefix or name != "step"):
            yield prefix + name, float(value)


def _thinned(points: list[list[float]]) -> tuple[list[list[float]], int]:
    """At most `MOST_POINTS`, each the mean of as many steps in a row, and how many these are."""
    every = math.ceil(len(points) / MOST_POINTS)
    parts = [points[start : start + every] for start in range(0, len(points), every)]
    return [[part[-1][0], _brief(math.fsum(value for _, value in part) / len(part))] for part in parts], every


def _meaning(title: str, run: RunView) -> tuple[str, str]:
    if title.endswith(" (validation)"):
        steers = title.removesuffix(" (validation)") in run.rewards
        return HELD_OUT, "reward: trained on" if steers else "watched, not trained on"
    fitting = [beginning for beginning in MEANINGS if title == beginning or title.startswith(beginning)]
    return MEANINGS[max(fitting, key=len)] if fitting else (LEARNING, "as the trainer logged it")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _brief(value: float) -> float:
    return float(f"{value:.6g}")
