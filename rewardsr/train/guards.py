"""Guards: metrics that watch a run on its held-out images and do not steer it, and what follows when one falls.

A guard is beyond its margin where its mean over the images lies further below the base's than that. Means, not ends of
intervals: base and policy see the same images and noise at every validation, so their difference is no accident of a
draw, and with few images an interval is widest where least is known.

What was judged stands in the lines of `metrics.jsonl`, and is all the state there is: a resumed run reads it there.
"""

import logging
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rewardsr.evaluation.comparison import Comparison
from rewardsr.evaluation.scoring import own_margins
from rewardsr.rewards import build
from rewardsr.rewards.base import Reward
from rewardsr.train.recipe import Recipe
from rewardsr.train.recipe_guards import PANEL, PANEL_OF, StopRecipe

RULE = "largest gain of the rewards, above 0, with every guard within its margin"

logger = logging.getLogger(__name__)


def named_guards(recipe: Recipe, has_hq: bool) -> dict[str, float | None]:
    """The guards of a recipe by name, the panel written out, each with the margin that the recipe gives it.

    Of the panel, rewards that steer are left out: they guard only where they are named.

    Args:
        recipe: of the run.
        has_hq: whether the held-out images have HQ.
    """
    found: dict[str, float | None] = {}
    steering = {entry.name for entry in recipe.rewards if entry.weight > 0}
    for guard in recipe.guards:
        if guard.name == PANEL:
            found |= {name: found.get(name) for name in PANEL_OF[has_hq] if name not in steering}
        else:
            found[guard.name] = guard.margin
    return found


def build_guards(
    recipe: Recipe, rewards: Mapping[str, Reward], has_hq: bool
) -> tuple[dict[str, Reward], dict[str, float]]:
    """What watches beside the recipe's rewards, and the margins of all guards that have one, by name.

    Raises:
        UserError: a metric that cannot be had.
    """
    named = named_guards(recipe, has_hq)
    guards = {name: build(name) for name in named if name not in rewards}
    own = own_margins({name: rewards.get(name) or guards[name] for name in named})
    return guards, own | {name: margin for name, margin in named.items() if margin is not None}


@dataclass(frozen=True)
class Verdict:
    """What a validation says of a run.

    Attributes:
        step: that it was made after.
        gain: of the rewards that steer, by weight, in standard deviations of the base's scores over the images.
        rewards: mean difference from the base of each of them.
        beyond: the same of each guard that is beyond its margin.
        kept: whether there is a checkpoint of that step.
    """

    step: int
    gain: float
    rewards: Mapping[str, float]
    beyond: Mapping[str, float]
    kept: bool = True


@dataclass
class Guards:
    """The verdicts of a run so far, and what they mean for it.

    Attributes:
        weights: of the rewards that steer, by name; nothing is judged where there are none.
        margins: of the guards, by name.
        stop: the rule that ends the run; None: it goes on.
        verdicts: in the order of their steps.
    """

    weights: Mapping[str, float]
    margins: Mapping[str, float]
    stop: StopRecipe | None
    verdicts: list[Verdict] = field(default_factory=list)

    def told(self, found: Mapping[str, Comparison]) -> dict[str, dict[str, Any]]:
        """What a validation's line in the log has of each metric: its summary, and the margin of a guard."""
        return {
            name: comparison.summary() | ({"margin": self.margins[name]} if name in self.margins else {})
            for name, comparison in found.items()
        }

    def judge(self, step: int, found: Mapping[str, Comparison]) -> dict[str, Any]:
        """Take in a validation; returns what its line in the log has to say of it (`read` takes it in again)."""
        if not self.weights:
            return {}
        gain = sum(weight * found[name].difference / _spread(found[name]) for name, weight in self.weights.items())
        gain /= sum(self.weights.values())
        rewards = {name: found[name].difference for name in self.weights}
        beyond = {
            name: found[name].difference for name, margin in self.margins.items() if found[name].difference < -margin
        }
        self.verdicts.append(Verdict(step, gain, rewards, beyond, step > 0))
        if beyond and gain > 0:
            logger.warning("step %d: %s", step, self.fall(self.verdicts[-1]))
        return {"guards": {"gain": gain, "beyond": beyond}}

    def read(self, lines: Iterable[Mapping[str, Any]], kept: Collection[int]) -> None:
        """Take in the validations that a log tells of; `kept`: the steps of which there are checkpoints."""
        for line in lines:
            if self.weights and "guards" in line:
                rewards = {name: line["validation"][name]["difference"] for name in self.weights}
                gain, beyond = line["guards"]["gain"], line["guards"]["beyond"]
                self.verdicts.append(Verdict(line["step"], gain, rewards, beyond, line["step"] in kept))

    @property
    def best(self) -> Verdict | None:
        """By the rule; of equal ones the last; None where no validation qualifies."""
        within = [verdict for verdict in self.verdicts if verdict.kept and verdict.gain > 0 and not verdict.beyond]
        return max(within, key=lambda verdict: (verdict.gain, verdict.step), default=None)

    @property
    def stopped(self) -> str | None:
        """Why the run ends here; None: it goes on."""
        if self.stop is None or len(self.verdicts) < self.stop.in_a_row:
            return None
        last = self.verdicts[-self.stop.in_a_row :]
        if any(not verdict.beyond or verdict.gain <= self.stop.gain for verdict in last):
            return None
        times = "" if len(last) == 1 else f", the last of {len(last)} such validations in a row"
        return f"{self.fall(last[-1])}{times}"

    def fall(self, verdict: Verdict) -> str:
        """What fell, and what the rewards did, in words."""
        fallen = ", ".join(
            f"{name} {change:+.4g} (margin {self.margins[name]:g})" for name, change in verdict.beyond.items()
        )
        rewards = ", ".join(f"{name} {change:+.4g}" for name, change in verdict.rewards.items())
        return f"{fallen} against the base, while {rewards}"


def _spread(comparison: Comparison) -> float:
    """Standard deviation of the base's scores over the images; 1 where there is none."""
    return (statistics.stdev(comparison.base) if len(comparison.base) > 1 else 0.0) or 1.0
