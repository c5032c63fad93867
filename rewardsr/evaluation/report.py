"""What an evaluation found, and the tables that show it; needs neither torch nor a pipeline."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

CONFIDENCE = 0.95
HEADINGS = ("reward", "base", "tuned", "difference [95 % interval]", "improved")


@dataclass(frozen=True)
class Comparison:
    """One reward on all images, base against tuned.

    Attributes:
        base, tuned: one score an image, averaged over the draws of noise; higher is better.
        low, high: 95 % interval of the mean difference (tuned - base) over images; NaN with one image.
    """

    base: tuple[float, ...]
    tuned: tuple[float, ...]
    low: float
    high: float

    @property
    def differences(self) -> tuple[float, ...]:
        """tuned - base, one an image."""
        return tuple(after - before for before, after in zip(self.base, self.tuned, strict=True))

    @property
    def base_mean(self) -> float:
        """Mean score of the base."""
        return sum(self.base) / len(self.base)

    @property
    def tuned_mean(self) -> float:
        """Mean score after fine-tuning."""
        return sum(self.tuned) / len(self.tuned)

    @property
    def difference(self) -> float:
        """Mean of tuned - base."""
        return sum(self.differences) / len(self.base)

    @property
    def improved(self) -> float:
        """Share of the images, in [0, 1], that score strictly higher after fine-tuning."""
        return sum(difference > 0 for difference in self.differences) / len(self.base)

    def summary(self) -> dict[str, Any]:
        """Means, their difference and its interval as plain data for JSON; ends that are unknown are None."""
        return {
            "base_mean": self.base_mean,
            "tuned_mean": self.tuned_mean,
            "difference": self.difference,
            "interval": [None if math.isnan(end) else end for end in (self.low, self.high)],
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; prints as a table, and shows itself as one in a notebook.

    `to_dict` and `from_dict` go through JSON unchanged.

    Attributes:
        images: where each image came from, in the order of the scores.
        rewards: the comparison of each reward, by its name.
        seed: of the noise.
        draws_per_image: draws of noise that each score averages.
        color_fix: what was done to the colours before scoring.
    """

    images: tuple[str, ...]
    rewards: Mapping[str, Comparison]
    seed: int
    draws_per_image: int
    color_fix: str

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def worst(self, reward: str, count: int = 10) -> list[tuple[str, float]]:
        """The images that lost most (or won least) under a reward, with their differences, worst first."""
        ranked = zip(self.images, self.rewards[reward].differences, strict=True)
        return sorted(ranked, key=lambda entry: entry[1])[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; means and shares are written beside the scores for people who read the file."""
        return {
            "seed": self.seed,
            "draws_per_image": self.draws_per_image,
            "color_fix": self.color_fix,
            "confidence": CONFIDENCE,
            "images": list(self.images),
            "rewards": {
                name: comparison.summary()
                | {
                    "improved": comparison.improved,
                    "base": list(comparison.base),
                    "tuned": list(comparison.tuned),
                }
                for name, comparison in self.rewards.items()
            },
        }

    def to_json(self) -> str:
        """`to_dict` as text, without NaN."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rewards = {}
        for name, entry in content["rewards"].items():
            low, high = (math.nan if end is None else float(end) for end in entry["interval"])
            rewards[name] = Comparison(tuple(entry["base"]), tuple(entry["tuned"]), low, high)
        return cls(
            images=tuple(content["images"]),
            rewards=rewards,
            seed=content["seed"],
            draws_per_image=content["draws_per_image"],
            color_fix=content["color_fix"],
        )


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The table as strings: `HEADINGS`, then one row a reward."""
    return [HEADINGS, *((name, *_row(comparison)) for name, comparison in evaluation.rewards.items())]


def text(evaluation: Evaluation) -> str:
    """The comparison as plain aligned text with the summary below it."""
    return "\n".join([*_aligned(rows(evaluation)), summary(evaluation)])


def side_by_side(evaluations: Mapping[str, Evaluation]) -> str:
    """What several changes to one base do, as plain text: its scores, and beside them a column of differences each.

    Args:
        evaluations: by the name of their column; all of the same rewards, images and noise.
    """
    first = next(iter(evaluations.values()))
    table = [("reward", "base", *evaluations)]
    for name, comparison in first.rewards.items():
        base = _signed(comparison.base_mean).removeprefix("+")
        table.append((name, base, *(_row(found.rewards[name])[2] for found in evaluations.values())))
    return "\n".join([*_aligned(table), summary(first)])


def markdown(evaluation: Evaluation) -> str:
    """The comparison as a Markdown table with the summary below it."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows(evaluation)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, f"| :--- |{' ---: |' * (len(HEADINGS) - 1)}")
    return "\n".join([*lines, "", summary(evaluation), ""])


def as_html(evaluation: Evaluation) -> str:
    """The comparison as an HTML table with the summary as its caption."""
    lines = []
    for number, row in enumerate(rows(evaluation)):
        tag = "td" if number else "th"
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
    return f"<table><caption>{html.escape(summary(evaluation))}</caption><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def summary(evaluation: Evaluation) -> str:
    """What the numbers were measured on, in one line."""
    count, draws = len(evaluation.images), evaluation.draws_per_image
    return (
        f"{count} image{'s' * (count != 1)}, {draws} draw{'s' * (draws != 1)} of noise each, seed {evaluation.seed}, "
        f"colour fix {evaluation.color_fix}; higher is better; interval: paired, over images (t)"
    )


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first column is words and whose others are numbers."""
    columns = []
    for place, column in enumerate(zip(*table, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if place else cell.ljust(width) for cell in column])
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def _row(comparison: Comparison) -> tuple[str, ...]:
    if math.isnan(comparison.low):
        interval = "[one image: none]"
    else:
        interval = f"[{_signed(comparison.low)}, {_signed(comparison.high)}]"
    return (
        _signed(comparison.base_mean).removeprefix("+"),
        _signed(comparison.tuned_mean).removeprefix("+"),
        f"{_signed(comparison.difference)} {interval}",
        f"{100 * comparison.improved:.0f} %",
    )


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+.1f}"
