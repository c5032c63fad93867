"""Two systems on the same images, one metric: differences, their interval, and how both are written."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


def interval(differences: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t, which few images widen as they should.

    It holds 95 of 100 times for differences that are about normally distributed, with 4 images as with 400. A skewed
    few (exponential, 4 images) hold about 88 times.

    Args:
        differences: one number an image.

    Returns:
        (low, high); (NaN, NaN) for a single image, which says nothing about others.

    Raises:
        ValueError: no differences, or some that are not finite.
    """
    values = np.asarray(list(differences), dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"interval: expected one finite number an image, got {values.tolist()[:5]}")
    if values.size == 1:
        return math.nan, math.nan
    quantile = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2))
    mean, half = float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean - half, mean + half


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

    @classmethod
    def of(cls, base: Sequence[float], tuned: Sequence[float]) -> Self:
        """The comparison of these scores, with its interval."""
        pairs = zip(base, tuned, strict=True)
        return cls(tuple(base), tuple(tuned), *interval(late - early for early, late in pairs))

    @property
    def differences(self) -> tuple[float, ...]:
        """tuned - base, one an image."""
        return tuple(after - before for before, after in zip(self.base, self.tuned, strict=True))

    @property
    def base_mean(self) -> float:
        """Mean score of the base."""
        return mean(self.base)

    @property
    def tuned_mean(self) -> float:
        """Mean score after fine-tuning."""
        return mean(self.tuned)

    @property
    def difference(self) -> float:
        """Mean of tuned - base."""
        return mean(self.differences)

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

    @classmethod
    def from_summary(cls, entry: Mapping[str, Any], base: Sequence[float], tuned: Sequence[float]) -> Self:
        """The comparison of these scores with the interval that a summary holds."""
        low, high = (math.nan if end is None else float(end) for end in entry["interval"])
        return cls(tuple(base), tuple(tuned), low, high)


def mean(values: Sequence[float]) -> float:
    """Mean of some numbers."""
    return sum(values) / len(values)


def change(comparison: Comparison, sign: float = 1.0) -> str:
    """The mean difference with its interval; with `sign` -1 as of the negative scores."""
    if math.isnan(comparison.low):
        return f"{signed(sign * comparison.difference)} [one image: none]"
    low, high = sorted((sign * comparison.low, sign * comparison.high))
    return f"{signed(sign * comparison.difference)} [{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    """A number with its sign."""
    value += 0.0  # of -0.0, which would show a minus
    return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+.1f}"


def unsigned(value: float) -> str:
    """A number, with a sign only below zero."""
    return signed(value).removeprefix("+")
