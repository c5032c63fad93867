"""What the cast test found: how much of each gain one constant offset of the latents gives; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from rewardsr.evaluation.comparison import Comparison, change, signed

CAST_HEADINGS = ("reward", "offset alone [95 %]", "share", "without it [95 %]")


@dataclass(frozen=True)
class OffsetTest:
    """One reward: its gain, and what one constant offset of the latents has to do with it; all on the same noise.

    Attributes:
        gain: base against tuned.
        alone: base against base + offset, without LoRA.
        without: base against tuned - offset.
        beyond: base + offset against tuned: what the LoRA gives more than its offset.
    """

    gain: Comparison
    alone: Comparison
    without: Comparison
    beyond: Comparison

    @property
    def share(self) -> float | None:
        """What the offset alone gives, as a share of the tuned pipeline's difference; None where that is nothing."""
        return self.alone.difference / self.gain.difference if self.gain.difference else None

    @property
    def share_in_words(self) -> str:
        """`share` in percent."""
        return "none" if self.share is None else f"{round(100 * self.share)} %"

    @property
    def mostly(self) -> bool:
        """Whether there is a gain (its interval above 0), and the offset alone gives more than half of it."""
        return self.gain.low > 0 and self.alone.difference > self.gain.difference / 2


@dataclass(frozen=True)
class Cast:
    """The cast test: how much of each gain is one constant offset of the latents, the same for every image.

    Attributes:
        offset: a number a channel; see `rewardsr.evaluation.offset.latent_offset`.
        measured_on: which images it was measured on, in words.
        rewards: the test of each reward, by its name.
    """

    offset: tuple[float, ...]
    measured_on: str
    rewards: Mapping[str, OffsetTest]

    @property
    def sentences(self) -> list[str]:
        """What the test says, a sentence for each reward that has a gain: the interval of its difference is above 0."""
        said = [self.sentence(name) for name, test in self.rewards.items() if test.gain.low > 0]
        return said or ["no reward has a gain (an interval above 0) that an offset could explain"]

    @property
    def summary(self) -> str:
        """What the offset is, and where it was measured."""
        return (
            f"offset: mean change of the latents at equal noise, {len(self.offset)} numbers, measured on "
            f"{self.measured_on}; alone: base plus offset; without it: tuned minus offset; both against base"
        )

    def sentence(self, name: str) -> str:
        """What the test says of a reward."""
        test = self.rewards[name]
        if not test.gain.low > 0:
            return f"{name} has no gain (an interval above 0) that an offset could explain"
        return (
            f"{'' if test.mostly else 'not '}mostly a global cast: of {name}'s {signed(test.gain.difference)}, one "
            "constant offset of the latents, the same for every image and without LoRA, gives "
            f"{signed(test.alone.difference)} ({test.share_in_words}); without it the LoRA gives "
            f"{change(test.without)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "offset": list(self.offset),
            "measured_on": self.measured_on,
            "rewards": {
                name: {
                    "alone": test.alone.summary() | {"scores": list(test.alone.tuned)},
                    "without": test.without.summary() | {"scores": list(test.without.tuned)},
                    "beyond": test.beyond.summary(),
                    "share": test.share,
                    "mostly_a_cast": test.mostly,
                }
                for name, test in self.rewards.items()
            },
            "sentences": self.sentences,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], gains: Mapping[str, Comparison]) -> Self:
        """The inverse of `to_dict`, given the gains that were tested."""
        rewards = {}
        for name, entry in content["rewards"].items():
            gain = gains[name]
            alone, without = (
                Comparison.from_summary(entry[key], gain.base, entry[key]["scores"]) for key in ("alone", "without")
            )
            beyond = Comparison.from_summary(entry["beyond"], alone.tuned, gain.tuned)
            rewards[name] = OffsetTest(gain, alone, without, beyond)
        return cls(tuple(content["offset"]), content["measured_on"], rewards)


def cast_rows(cast: Cast) -> list[tuple[str, ...]]:
    """The cast test as strings: `CAST_HEADINGS`, then one row a reward; a share only where there is a gain."""
    table: list[tuple[str, ...]] = [CAST_HEADINGS]
    for name, test in cast.rewards.items():
        share = test.share_in_words if test.gain.low > 0 else "-"
        table.append((name, change(test.alone), share, change(test.without)))
    return table
