"""What an evaluation says, in words: whether it got better, on which images, and whether that is real."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rewardsr.evaluation.cast import OffsetTest
from rewardsr.evaluation.comparison import Comparison
from rewardsr.evaluation.page.content import EvaluationView, Page, distinct
from rewardsr.evaluation.report import Evaluation

Tone = Literal["good", "bad", "mixed", "none"]
MOST_NOTES = 3  # of a run; all of them stand beside its recipe


@dataclass(frozen=True)
class Verdict:
    """The answer for one tuned system.

    Attributes:
        name: of the system.
        headline: in a few words.
        tone: how the headline is to be taken.
        sentences: what it rests on.
        lead: the metric that is spoken of first: the first reward trained on, or the first metric.
        worst: the image that gained least under it.
    """

    name: str
    headline: str
    tone: Tone
    sentences: tuple[str, ...]
    lead: str
    worst: str


def judge(page: Page, view: EvaluationView) -> Verdict:
    """The verdict on one evaluation of the page, beside its run's shuffled control where the page has one."""
    found, run = view.evaluation, page.run_of(view)
    steering = [name for name in found.rewards if run is not None and name in run.rewards]
    lead = (steering or list(found.rewards))[0]
    compared = found.rewards[lead]
    sentences = [_on_images(found, lead, compared), *_small_falls(found)]
    said = _control(page, view, steering or [lead])
    headline, tone = _headline(found, steering)
    if run is not None and run.shuffled:
        headline, tone = f"Control with advantages at random: {headline.lower()}", "none"
    elif said is not None:
        beyond, sentence = said
        sentences.append(sentence)
        if not beyond and tone == "good":
            headline, tone = "No more than its control", "bad"
    if found.cast is not None:
        sentences.append(_cast(found.cast.rewards[lead], lead))
        if any(test.mostly for name, test in found.cast.rewards.items() if name in (steering or [lead])):
            headline, tone = "Mostly a global cast", "bad"
    if run is not None:
        sentences += run.notes[-MOST_NOTES:]
    worst = distinct(found.images)[min(range(len(found.images)), key=compared.differences.__getitem__)]
    return Verdict(view.name, headline, tone, tuple(sentences), lead, worst)


def direction(comparison: Comparison) -> int:
    """1 where the interval of the change is above 0, -1 where it is below, else 0."""
    return int(comparison.low > 0) - int(comparison.high < 0)


def within(comparison: Comparison, margin: float | None) -> bool:
    """Whether a change is a fall that its metric's margin allows, by the rule of guards: the mean counts."""
    return margin is not None and direction(comparison) < 0 and comparison.difference >= -margin


def number(value: float, signed: bool = True) -> str:
    """A score in at most four decimals; a minus sign that is one."""
    text = f"{value:{'+' if signed else ''}.4f}" if abs(value) < 1000 else f"{value:{'+' if signed else ''}.1f}"
    return text.replace("-", "\N{MINUS SIGN}")


def change(comparison: Comparison) -> str:
    """A change with its interval."""
    if math.isnan(comparison.low):
        return f"{number(comparison.difference)} [one image: no interval]"
    return f"{number(comparison.difference)} [{number(comparison.low)}, {number(comparison.high)}]"


def _headline(found: Evaluation, steering: Sequence[str]) -> tuple[str, Tone]:
    if len(found.images) == 1:
        return "One image settles nothing", "none"
    small = _small(found)
    ways = {name: 0 if name in small else direction(comparison) for name, comparison in found.rewards.items()}
    up, down = ([name for name, way in ways.items() if way == sign] for sign in (1, -1))
    watched = [name for name in ways if name not in steering]
    if not up and not down and small:
        return f"No gain; down within {'its margin' if len(small) == 1 else 'their margins'}: {_listed(small)}", "none"
    if not up and not down:
        return "No change that the intervals settle", "none"
    if not down:
        return f"Better: {_listed(up)}", "good"
    if not up:
        return f"Worse: {_listed(down)}", "bad"
    if set(up) & set(steering) and sum(ways[name] for name in watched) < 0:
        return f"Rewards rose, but {_listed([name for name in down if name in watched])} fell: reward hacking?", "bad"
    return f"Mixed: up {_listed(up)}; down {_listed(down)}", "mixed"


def _small(found: Evaluation) -> list[str]:
    """The metrics that fell within their margins."""
    return [name for name, comparison in found.rewards.items() if within(comparison, found.margins.get(name))]


def _small_falls(found: Evaluation) -> list[str]:
    """The sentence on them, where there are some: they do not count, and are not hidden."""
    falls = [f"{name} {change(found.rewards[name])} (margin {found.margins[name]:g})" for name in _small(found)]
    return [f"Down within the margin, which does not count: {'; '.join(falls)}."] if falls else []


def _listed(names: Sequence[str]) -> str:
    """All of a few names, the count of many."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _on_images(found: Evaluation, lead: str, compared: Comparison) -> str:
    better, count = sum(difference > 0 for difference in compared.differences), len(found.images)
    return f"{lead} {change(compared)}: up on {better} of {count} image{'s' * (count != 1)}."


def _cast(test: OffsetTest, name: str) -> str:
    if not test.gain.low > 0:
        return f"Cast test: {name} has no gain that an offset of the latents could explain."
    return (
        f"Cast test: one constant offset of the latents gives {test.share_in_words} of {name}'s gain; without it the "
        f"LoRA gives {change(test.without)}."
    )


def _control(page: Page, view: EvaluationView, names: Sequence[str]) -> tuple[bool, str] | None:
    """Whether the gains go beyond those of the shuffled control of the same trainer and rewards, and the sentence."""
    run = page.run_of(view)
    if run is None or run.shuffled:
        return None
    for other in page.evaluations:
        control = page.run_of(other)
        if control is None or not control.shuffled or control.recipe.get("trainer") != run.recipe.get("trainer"):
            continue
        theirs = other.evaluation.rewards
        if control.rewards != run.rewards or not all(name in theirs for name in names):
            continue
        gains = {name: view.evaluation.rewards[name].low for name in names}
        beyond = [name for name in names if gains[name] > abs(theirs[name].difference)]
        drift = "; ".join(f"{name} {change(theirs[name])}" for name in names)
        which = "all" if len(beyond) == len(names) else ", ".join(beyond) or "none"
        return bool(beyond), f"Control {other.name}: {drift}. Gains beyond its drift: {which}."
    return None
