"""What an evaluation found, and the tables that show it; needs neither torch nor a pipeline."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any, Self

CONFIDENCE = 0.95
HEADINGS = ("reward", "base", "tuned", "difference [95 % interval]", "improved")
CAST_HEADINGS = ("reward", "offset alone [95 %]", "share", "without it [95 %]")
WIDTH = 80  # columns of a terminal


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
        return "none" if self.share is None else f"{100 * self.share:.0f} %"

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

    def sentence(self, name: str) -> str:
        """What the test says of a reward."""
        test = self.rewards[name]
        if not test.gain.low > 0:
            return f"{name} has no gain (an interval above 0) that an offset could explain"
        return (
            f"{'' if test.mostly else 'not '}mostly a global cast: of {name}'s {_signed(test.gain.difference)}, one "
            "constant offset of the latents, the same for every image and without LoRA, gives "
            f"{_signed(test.alone.difference)} ({test.share_in_words}); without it the LoRA gives "
            f"{_change(test.without)}"
        )


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
        cast: how much of the gains a constant offset of the latents gives, where that was asked for.
    """

    images: tuple[str, ...]
    rewards: Mapping[str, Comparison]
    seed: int
    draws_per_image: int
    color_fix: str
    cast: Cast | None = None

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
        content = {
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
        return content if self.cast is None else content | {"cast": _cast_to_dict(self.cast)}

    def to_json(self) -> str:
        """`to_dict` as text, without NaN."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rewards = {
            name: _comparison(entry, entry["base"], entry["tuned"]) for name, entry in content["rewards"].items()
        }
        return cls(
            images=tuple(content["images"]),
            rewards=rewards,
            seed=content["seed"],
            draws_per_image=content["draws_per_image"],
            color_fix=content["color_fix"],
            cast=_cast_from_dict(content["cast"], rewards) if "cast" in content else None,
        )


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The table as strings: `HEADINGS`, then one row a reward."""
    return [HEADINGS, *((name, *_row(comparison)) for name, comparison in evaluation.rewards.items())]


def cast_rows(cast: Cast) -> list[tuple[str, ...]]:
    """The cast test as strings: `CAST_HEADINGS`, then one row a reward; a share only where there is a gain."""
    table: list[tuple[str, ...]] = [CAST_HEADINGS]
    for name, test in cast.rewards.items():
        share = test.share_in_words if test.gain.low > 0 else "-"
        table.append((name, _change(test.alone), share, _change(test.without)))
    return table


def text(evaluation: Evaluation) -> str:
    """The comparison as plain aligned text with the summary below it; then, in 80 columns, the cast test."""
    lines = [*_aligned(rows(evaluation)), summary(evaluation)]
    if evaluation.cast is not None:
        said = [*evaluation.cast.sentences, _cast_summary(evaluation.cast)]
        lines += ["", *_aligned(cast_rows(evaluation.cast)), *(_wrapped(sentence) for sentence in said)]
    return "\n".join(lines)


def side_by_side(first: Evaluation, columns: Mapping[str, Mapping[str, Comparison]]) -> str:
    """What several changes to one base do, as plain text: its scores, and beside them a column of differences each.

    Args:
        first: the evaluation whose base, images and noise all columns share.
        columns: by their name the comparisons of each reward.
    """
    table = [("reward", "base", *columns)]
    for name, comparison in first.rewards.items():
        base = _signed(comparison.base_mean).removeprefix("+")
        table.append((name, base, *(_change(column[name]) for column in columns.values())))
    return "\n".join([*_aligned(table), summary(first)])


def markdown(evaluation: Evaluation) -> str:
    """The comparison as a Markdown table with the summary below it; then the cast test."""
    return "\n".join(
        line
        for table, said in _tables(evaluation)
        for line in [*_markdown_table(table), *(part for sentence in said for part in ("", sentence)), ""]
    )


def as_html(evaluation: Evaluation) -> str:
    """The comparison as an HTML table with the summary as its caption; then the cast test."""
    tables = []
    for table, said in _tables(evaluation):
        lines = []
        for number, row in enumerate(table):
            tag = "td" if number else "th"
            lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
        caption = html.escape(". ".join(said))
        tables.append(f"<table><caption>{caption}</caption><tr>{'</tr><tr>'.join(lines)}</tr></table>")
    return "".join(tables)


def summary(evaluation: Evaluation) -> str:
    """What the numbers were measured on, in one line."""
    count, draws = len(evaluation.images), evaluation.draws_per_image
    return (
        f"{count} image{'s' * (count != 1)}, {draws} draw{'s' * (draws != 1)} of noise each, seed {evaluation.seed}, "
        f"colour fix {evaluation.color_fix}; higher is better; interval: paired, over images (t)"
    )


def _wrapped(sentence: str) -> str:
    return fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False)


def _tables(evaluation: Evaluation) -> list[tuple[list[tuple[str, ...]], list[str]]]:
    """Every table there is, with what is said of it."""
    tables = [(rows(evaluation), [summary(evaluation)])]
    if evaluation.cast is not None:
        tables.append((cast_rows(evaluation.cast), [*evaluation.cast.sentences, _cast_summary(evaluation.cast)]))
    return tables


def _markdown_table(table: Sequence[tuple[str, ...]]) -> list[str]:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in table]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, f"| :--- |{' ---: |' * (len(table[0]) - 1)}")
    return lines


def _cast_summary(cast: Cast) -> str:
    return (
        f"offset: mean change of the latents at equal noise, {len(cast.offset)} numbers, measured on "
        f"{cast.measured_on}; alone: base plus offset; without it: tuned minus offset; both against base"
    )


def _cast_to_dict(cast: Cast) -> dict[str, Any]:
    return {
        "offset": list(cast.offset),
        "measured_on": cast.measured_on,
        "rewards": {
            name: {
                "alone": test.alone.summary() | {"tuned": list(test.alone.tuned)},
                "without": test.without.summary() | {"tuned": list(test.without.tuned)},
                "beyond": test.beyond.summary(),
                "share": test.share,
                "mostly_a_cast": test.mostly,
            }
            for name, test in cast.rewards.items()
        },
        "sentences": cast.sentences,
    }


def _cast_from_dict(content: Mapping[str, Any], gains: Mapping[str, Comparison]) -> Cast:
    rewards = {}
    for name, entry in content["rewards"].items():
        gain = gains[name]
        alone, without = (_comparison(entry[key], gain.base, entry[key]["tuned"]) for key in ("alone", "without"))
        rewards[name] = OffsetTest(gain, alone, without, _comparison(entry["beyond"], alone.tuned, gain.tuned))
    return Cast(tuple(content["offset"]), content["measured_on"], rewards)


def _comparison(entry: Mapping[str, Any], base: Sequence[float], tuned: Sequence[float]) -> Comparison:
    low, high = (math.nan if end is None else float(end) for end in entry["interval"])
    return Comparison(tuple(base), tuple(tuned), low, high)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first column is words and whose others are numbers."""
    columns = []
    for place, column in enumerate(zip(*table, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if place else cell.ljust(width) for cell in column])
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def _row(comparison: Comparison) -> tuple[str, ...]:
    return (
        _signed(comparison.base_mean).removeprefix("+"),
        _signed(comparison.tuned_mean).removeprefix("+"),
        _change(comparison),
        f"{100 * comparison.improved:.0f} %",
    )


def _change(comparison: Comparison) -> str:
    if math.isnan(comparison.low):
        return f"{_signed(comparison.difference)} [one image: none]"
    return f"{_signed(comparison.difference)} [{_signed(comparison.low)}, {_signed(comparison.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+.1f}"
