"""What an evaluation found, and the tables that show it; needs neither torch nor a pipeline."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import Any, Self

from rewardsr.errors import UserError
from rewardsr.evaluation.cast import Cast, cast_rows
from rewardsr.evaluation.comparison import CONFIDENCE, Comparison, change, mean, signed, unsigned
from rewardsr.storage import read_text

CHANGE, IMPROVED = "difference [95 % interval]", "improved"
HEADINGS = ("reward", "system", "mean", CHANGE, IMPROVED)  # of three systems and more
TRAINED_ON, HELD_OUT = "trained on", "held out"
WIDTH = 80  # columns of a terminal
LARGEST = 2**28  # bytes of an evaluation's file

Scores = Mapping[str, tuple[float, ...]]
"""By metric one score an image, averaged over the draws of noise; higher is better."""


@dataclass(frozen=True)
class Evaluation:
    """What systems made of the same images, scored; prints as a table, and shows itself as one in a notebook.

    A system is what makes an image of an LQ image: the base, the base with a LoRA, bicubic, another program. `to_dict`
    and `from_dict` go through JSON unchanged.

    Attributes:
        images: where each image came from, in the order of the scores.
        scores: by system, in the order of the table; the first one is what all others are compared with.
        seed: of the noise.
        draws_per_image: draws of noise that each score averages.
        color_fix: what was done to the colours before scoring.
        casts: by system how much of its gains a constant offset of the latents gives, where that was asked for.
        sets: by system what metrics of whole sets of images give (FID), higher is better; they have no interval.
        negated: metrics of which lower is better; their scores are the negative of what tables show.
        trained_on: metrics that steered the training of a system.
        margins: how far the mean of a guard may lie below the first system's before the page counts it as a fall.
        settings: what the evaluation was asked for (systems, protocol, data, versions), for the file.
        weights: by system hashes of what it computed with (base, LoRA, files), for the file.
    """

    images: tuple[str, ...]
    scores: Mapping[str, Scores]
    seed: int
    draws_per_image: int
    color_fix: str
    casts: Mapping[str, Cast] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    negated: tuple[str, ...] = ()
    trained_on: tuple[str, ...] = ()
    margins: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def first(self) -> str:
        """The system that the others are compared with."""
        return next(iter(self.scores))

    @property
    def compared(self) -> tuple[str, ...]:
        """All other systems."""
        return tuple(self.scores)[1:]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.scores[self.first])

    @cached_property
    def comparisons(self) -> Mapping[str, Mapping[str, Comparison]]:
        """By system and metric how the others compare with the first one."""
        base = self.scores[self.first]
        return {
            system: {name: Comparison.of(base[name], self.scores[system][name]) for name in self.metrics}
            for system in self.compared
        }

    @property
    def rewards(self) -> Mapping[str, Comparison]:
        """By metric how the last system compares with the first one: tuned with base, where there are these two.

        Raises:
            ValueError: there is one system alone.
        """
        if not self.compared:
            raise ValueError(f"'{self.first}' is the only system: there is nothing to compare it with")
        return self.comparisons[self.compared[-1]]

    def pair(self, system: str) -> Self:
        """The first system and this one alone."""
        return replace(
            self,
            scores={name: self.scores[name] for name in (self.first, system)},
            casts={name: cast for name, cast in self.casts.items() if name == system},
            sets={name: values for name, values in self.sets.items() if name in (self.first, system)},
            weights={name: hashes for name, hashes in self.weights.items() if name in (self.first, system)},
        )

    @property
    def cast(self) -> Cast | None:
        """The cast test of the last system, if it was made."""
        return self.casts.get(self.compared[-1]) if self.compared else None

    def shown(self, metric: str) -> float:
        """1, or -1 for a metric whose scores are the negative of what is shown."""
        return -1.0 if metric in self.negated else 1.0

    def worst(self, reward: str, count: int = 10, system: str | None = None) -> list[tuple[str, float]]:
        """The images that lost most (or won least) under a reward, with their differences, worst first.

        Args:
            reward: the metric.
            count: of images.
            system: one that is compared; the last by default.
        """
        compared = self.rewards if system is None else self.comparisons[system]
        return sorted(zip(self.images, compared[reward].differences, strict=True), key=lambda entry: entry[1])[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; means, differences and shares stand beside the scores for people who read the file."""
        content: dict[str, Any] = {
            "seed": self.seed,
            "draws_per_image": self.draws_per_image,
            "color_fix": self.color_fix,
            "confidence": CONFIDENCE,
            "images": list(self.images),
            "compared_with": self.first,
            "systems": {system: self._system_to_dict(system) for system in self.scores},
        }
        more = {
            "casts": {system: cast.to_dict() for system, cast in self.casts.items()},
            "sets": {system: dict(values) for system, values in self.sets.items()},
            "negated": list(self.negated),
            "trained_on": list(self.trained_on),
            "margins": dict(self.margins),
            "settings": dict(self.settings),
            "weights": {system: dict(hashes) for system, hashes in self.weights.items()},
        }
        return content | {key: value for key, value in more.items() if value}

    def _system_to_dict(self, system: str) -> dict[str, Any]:
        entries: dict[str, Any] = {
            metric: {"mean": mean(scores), "scores": list(scores)} for metric, scores in self.scores[system].items()
        }
        for metric, comparison in self.comparisons.get(system, {}).items():
            told = comparison.summary()
            entries[metric] |= {
                "difference": told["difference"],
                "interval": told["interval"],
                "improved": comparison.improved,
                "worst": [name for name, _ in self.worst(metric, system=system)],
            }
        return entries

    def to_json(self) -> str:
        """`to_dict` as text, without NaN."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        scores = {
            system: {metric: tuple(entry["scores"]) for metric, entry in entries.items()}
            for system, entries in content["systems"].items()
        }
        plain = cls(
            images=tuple(content["images"]),
            scores=scores,
            seed=content["seed"],
            draws_per_image=content["draws_per_image"],
            color_fix=content["color_fix"],
            sets=content.get("sets", {}),
            negated=tuple(content.get("negated", ())),
            trained_on=tuple(content.get("trained_on", ())),
            margins={name: float(margin) for name, margin in content.get("margins", {}).items()},
            settings=content.get("settings", {}),
            weights=content.get("weights", {}),
        )
        for system, cast in content.get("casts", {}).items():
            plain.casts[system] = Cast.from_dict(cast, plain.comparisons[system])  # type: ignore[index]
        return plain

    @classmethod
    def read(cls, path: Path) -> Self:
        """The evaluation in a file.

        Raises:
            UserError: it cannot be read, or holds something else, or one that was not finished.
        """
        try:
            return cls.from_dict(json.loads(read_text(path, f"'{path}'", LARGEST)))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            raise UserError(f"'{path}' holds no evaluation, or one that was not finished: {error}") from error


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The table as strings: headings, then one row a metric; with other than two systems one a metric and system.

    Where it is known what systems were trained on, those metrics and the ones held out stand apart, each group below a
    row that names it.
    """
    two = len(evaluation.scores) == 2
    table = [("reward", *evaluation.scores, CHANGE, IMPROVED) if two else HEADINGS]
    for title, metrics in groups(evaluation):
        if title:
            table.append((title, *[""] * (len(table[0]) - 1)))
        for metric in metrics:
            table += [_row(evaluation, metric)] if two else _long_rows(evaluation, metric)
    return table


def groups(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """All metrics, those of sets among them, by whether systems were trained on them; one group without a name if
    that is not known."""
    names = [*evaluation.metrics, *evaluation.sets.get(evaluation.first, {})]
    if not evaluation.trained_on:
        return [("", names)]
    trained = [name for name in names if name in evaluation.trained_on]
    held_out = [name for name in names if name not in evaluation.trained_on]
    return [(title, found) for title, found in ((TRAINED_ON, trained), (HELD_OUT, held_out)) if found]


def mean_of(evaluation: Evaluation, system: str, metric: str) -> float:
    """What a system has under a metric, over all images, as tables show it."""
    of_set = evaluation.sets.get(system, {})
    value = of_set[metric] if metric in of_set else mean(evaluation.scores[system][metric])
    return evaluation.shown(metric) * value


def text(evaluation: Evaluation) -> str:
    """The comparison as plain aligned text with the summary below it; then, in 80 columns, the cast tests."""
    lines = [*_aligned(rows(evaluation), 1 if len(evaluation.scores) == 2 else 2), summary(evaluation)]
    for system, cast in evaluation.casts.items():
        named = [f"cast test of {system}"] if len(evaluation.casts) > 1 else []
        said = [_wrapped(sentence) for sentence in (*cast.sentences, cast.summary)]
        lines += ["", *named, *_aligned(cast_rows(cast)), *said]
    return "\n".join(lines)


def side_by_side(first: Evaluation, columns: Mapping[str, Mapping[str, Comparison]]) -> str:
    """What several changes to one base do, as plain text: its scores, and beside them a column of differences each.

    Args:
        first: the evaluation whose base, images and noise all columns share.
        columns: by their name the comparisons of each reward.
    """
    table = [("reward", "base", *columns)]
    for name, comparison in first.rewards.items():
        base = unsigned(comparison.base_mean)
        table.append((name, base, *(change(column[name]) for column in columns.values())))
    return "\n".join([*_aligned(table), summary(first)])


def markdown(evaluation: Evaluation) -> str:
    """The comparison as a Markdown table with the summary below it; then the cast tests."""
    return "\n".join(
        line
        for table, said in _tables(evaluation)
        for line in [*markdown_table(table), *(part for sentence in said for part in ("", sentence)), ""]
    )


def as_html(evaluation: Evaluation) -> str:
    """The comparison as an HTML table with the summary as its caption; then the cast tests."""
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
    lower = f" (of {', '.join(evaluation.negated)} lower)" if evaluation.negated else ""
    versus = f"against {evaluation.first}, " if len(evaluation.scores) > 2 else ""
    return (
        f"{count} image{'s' * (count != 1)}, {draws} draw{'s' * (draws != 1)} of noise each, seed {evaluation.seed}, "
        f"colour fix {evaluation.color_fix}; higher is better{lower}; interval: {versus}paired, over images (t)"
    )


def markdown_table(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; the first row has the headings."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in table]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, f"| :--- |{' ---: |' * (len(table[0]) - 1)}")
    return lines


def _wrapped(sentence: str) -> str:
    return fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False)


def _tables(evaluation: Evaluation) -> list[tuple[list[tuple[str, ...]], list[str]]]:
    """Every table there is, with what is said of it."""
    tables = [(rows(evaluation), [summary(evaluation)])]
    for system, cast in evaluation.casts.items():
        named = [f"cast test of {system}"] if len(evaluation.casts) > 1 else []
        tables.append((cast_rows(cast), [*named, *cast.sentences, cast.summary]))
    return tables


def _aligned(table: Sequence[tuple[str, ...]], words: int = 1) -> list[str]:
    """Lines of a table whose first columns are words and whose others are numbers."""
    columns = []
    for place, column in enumerate(zip(*table, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if place < words else cell.rjust(width) for cell in column])
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def _row(evaluation: Evaluation, metric: str) -> tuple[str, ...]:
    """A metric of two systems."""
    means = (unsigned(mean_of(evaluation, system, metric)) for system in evaluation.scores)
    return (metric, *means, *_against(evaluation, evaluation.compared[0], metric))


def _long_rows(evaluation: Evaluation, metric: str) -> list[tuple[str, ...]]:
    """A metric, a row for each system."""
    return [
        (
            "" if place else metric,
            system,
            unsigned(mean_of(evaluation, system, metric)),
            *(_against(evaluation, system, metric) if place else ("", "")),
        )
        for place, system in enumerate(evaluation.scores)
    ]


def _against(evaluation: Evaluation, system: str, metric: str) -> tuple[str, str]:
    """The change against the first system, and on which share of the images it is one for the better."""
    if metric not in evaluation.metrics:
        gap = mean_of(evaluation, system, metric) - mean_of(evaluation, evaluation.first, metric)
        return f"{signed(gap)} [one set: none]", "-"
    comparison = evaluation.comparisons[system][metric]
    return change(comparison, evaluation.shown(metric)), f"{100 * comparison.improved:.0f} %"
