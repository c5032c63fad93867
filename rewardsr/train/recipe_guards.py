"""The part of a recipe that says what is watched on held-out images, and when that ends a run."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from rewardsr.options import Count, Options

PANEL = "panel"
PANEL_OF = {
    True: ("psnr", "ssim", "lq_consistency", "high_frequency", "color_shift", "clipping", "periodic_pattern"),
    False: ("lq_consistency", "high_frequency_lq", "color_shift", "clipping", "periodic_pattern"),
}
"""What the guard "panel" stands for, by whether the held-out images have HQ; nothing of it needs a download."""


class GuardRecipe(Options):
    """A metric that watches."""

    name: str = Field(description="of a metric, as in rewards; panel: several, none of which needs a download")
    margin: float | None = Field(
        None,
        ge=0,
        le=1e9,
        description="how far below the base's its mean may lie; null: the metric's own margin; without that it only "
        "watches",
    )

    @model_validator(mode="after")
    def _of_one(self) -> Self:
        if self.name == PANEL and self.margin is not None:
            raise ValueError("the metrics of the panel have margins of their own: name the one that gets another")
        return self


def _listed(value: Any) -> Any:
    """Guards as users write them: names, or mappings; None: none."""
    entries = [] if value is None else value
    if not isinstance(entries, list | tuple):
        raise ValueError("expected a list of names")
    return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


def _plainly(guards: tuple[GuardRecipe, ...]) -> list[Any]:
    """As in a recipe: the name alone where there is no margin."""
    return [guard.name if guard.margin is None else guard.model_dump(mode="json") for guard in guards]


Guards = Annotated[tuple[GuardRecipe, ...], BeforeValidator(_listed), PlainSerializer(_plainly)]


class StopRecipe(Options):
    """When a run ends before its last step: its rewards have a gain on held-out images while a guard is beyond its
    margin, several validations in a row. Both are means over the images, against the base."""

    in_a_row: Count = Field(2, description="so many validations")
    gain: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="rewards count as risen above this: their mean gain by weight, each in standard deviations of the "
        "base's scores over the images",
    )
