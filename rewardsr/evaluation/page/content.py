"""What `report.html` shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rewardsr.errors import UserError
from rewardsr.evaluation.report import Evaluation
from rewardsr.train.recipe_text import read_yaml


@dataclass(frozen=True)
class Picture:
    """One image in all its versions.

    Attributes:
        name: of the image; `EvaluationView` calls it the same.
        images: encoded PNG, JPEG or WebP files of one part of the image by their label ("LQ", "base", "tuned", "HQ"),
            in the order of display; sizes may differ, proportions not.
        scores: by label and metric, where the image was scored; higher is better.
    """

    name: str
    images: Mapping[str, bytes]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunView:
    """What a run left behind.

    Attributes:
        name: in legends and headings.
        recipe_text: `recipe.yaml`.
        versions: of packages and devices, by name.
        steps: lines of `metrics.jsonl`, each with its "step".
        notes: what the run says of itself: why it stopped, what was not finite.
    """

    name: str
    recipe_text: str
    versions: Mapping[str, str]
    steps: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's content; empty where it cannot be read."""
        try:
            content = read_yaml(self.recipe_text, self.name)
        except UserError:
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def rewards(self) -> tuple[str, ...]:
        """What the run was trained on, by name; not what only watches (weight 0)."""
        listed = [entry for entry in self.recipe.get("rewards") or [] if isinstance(entry, dict)]
        return tuple(str(entry["name"]) for entry in listed if "name" in entry and entry.get("weight") != 0)

    @property
    def margins(self) -> dict[str, Any]:
        """Of its guards, as its newest validations were judged by them."""
        found: dict[str, Any] = {}
        for line in self.steps:
            validation = line.get("validation")
            for name, summary in validation.items() if isinstance(validation, Mapping) else ():
                if isinstance(summary, Mapping) and "margin" in summary:
                    found[name] = summary["margin"]
        return found

    @property
    def shuffled(self) -> bool:
        """Whether it is a control: advantages were dealt out at random."""
        return bool((self.recipe.get("trainer_options") or {}).get("shuffle_advantages"))


@dataclass(frozen=True)
class EvaluationView:
    """Base against tuned on images, one tuned system a view.

    Attributes:
        name: of the tuned system; that of a `RunView` where it is its LoRA.
        content: `Evaluation.to_dict()`.
    """

    name: str
    content: Mapping[str, Any]

    @cached_property
    def evaluation(self) -> Evaluation:
        """The content as an `Evaluation`.

        Raises:
            UserError: it is none.
        """
        try:
            return Evaluation.from_dict(self.content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the evaluation of '{self.name}' is damaged: {error!r}") from error


@dataclass(frozen=True)
class Page:
    """Everything that one page shows; what there is none of is left out.

    Attributes:
        title: heading.
        runs: with curves, recipe and versions.
        evaluations: with verdict and scores of every image.
        pictures: with slider and difference.
    """

    title: str
    runs: Sequence[RunView] = ()
    evaluations: Sequence[EvaluationView] = ()
    pictures: Sequence[Picture] = ()

    def run_of(self, view: EvaluationView) -> RunView | None:
        """The run whose LoRA was evaluated."""
        return next((run for run in self.runs if run.name == view.name), None)


def distinct(names: Sequence[str]) -> list[str]:
    """The same names, told apart where one comes again: `1.png`, `1.png (2)`."""
    seen: dict[str, int] = {}
    told = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return told
