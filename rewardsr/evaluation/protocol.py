"""Paired comparison of a pipeline before and after fine-tuning: same images, same noise, same colour fix."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rewardsr.adapter import Batch, ISRAdapter
from rewardsr.draws import Draws
from rewardsr.errors import TrainingError, UserError
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.rewards.base import Reward

CONFIDENCE = 0.95

_RESAMPLES = 10_000
_CHUNK = 2_000_000  # numbers held at once while resampling


@dataclass(frozen=True)
class Comparison:
    """One reward on all images, base against tuned.

    Attributes:
        base, tuned: one score an image, averaged over the draws of noise; higher is better.
        low, high: 95 % interval of the mean difference (tuned - base), bootstrapped by image; NaN with one image.
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


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; `to_dict` and `from_dict` go through JSON unchanged.

    Attributes:
        images: where each image came from, in the order of the scores.
        rewards: the comparison of each reward, by its name.
        seed: of the noise and of the bootstrap.
        draws_per_image: draws of noise that each score averages.
        color_fix: what was done to the colours before scoring.
    """

    images: tuple[str, ...]
    rewards: Mapping[str, Comparison]
    seed: int
    draws_per_image: int
    color_fix: str

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
                name: {
                    "base_mean": comparison.base_mean,
                    "tuned_mean": comparison.tuned_mean,
                    "difference": comparison.difference,
                    "interval": [None if math.isnan(end) else end for end in (comparison.low, comparison.high)],
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


def bootstrap(differences: Iterable[float], seed: int, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron 1979): images are drawn with replacement, again and again.

    With fewer than about 20 images it is too narrow: read it as a lower bound on the uncertainty.

    Args:
        differences: one number an image.
        seed: equal seeds give equal intervals.
        resamples: how many times to resample.

    Returns:
        (low, high); (NaN, NaN) for a single image, which says nothing about others.

    Raises:
        ValueError: no differences, or some that are not finite.
    """
    values = np.asarray(list(differences), dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"bootstrap: expected one finite number an image, got {values.tolist()[:5]}")
    if values.size == 1:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < resamples:
        rows = min(resamples - len(means), max(1, _CHUNK // values.size))
        means.extend(values[random.integers(0, values.size, (rows, values.size))].mean(axis=1).tolist())
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def evaluate(
    adapter: ISRAdapter,
    data: Path | str,
    metrics: Sequence[str] = ("psnr", "ssim"),
    *,
    draws_per_image: int = 1,
    seed: int = 0,
    limit: int | None = None,
    prompts: str = "adapter",
) -> Evaluation:
    """Score base against tuned on a data folder, with the same noise; see `compare`.

    Args:
        adapter: with a LoRA loaded.
        data: folder of pairs (`lq/`, `gt/`), or of HQ images, which are degraded with the default settings.
        metrics: names of rewards or pyiqa metrics.
        draws_per_image: noise draws that a score is averaged over.
        seed: of degradation and noise.
        limit: the first so many images.
        prompts: "adapter", "sidecar" (text files), or one text for all.
    """
    from rewardsr.data.degradation import make_degradation
    from rewardsr.data.folder import open_data
    from rewardsr.rewards import build
    from rewardsr.train.recipe import DegradationRecipe

    degradation = make_degradation(DegradationRecipe(), adapter.scale)
    folder = open_data(data, scale=adapter.scale, degradation=degradation, prompts=prompts, extras=adapter.extras)
    rewards = {name: build(name) for name in metrics}
    return compare(adapter, folder.validation(limit, seed), rewards, seed=seed, draws_per_image=draws_per_image)


@torch.no_grad()
def compare(
    adapter: ISRAdapter,
    images: Iterable[Batch],
    rewards: Mapping[str, Reward],
    *,
    seed: int = 0,
    draws_per_image: int = 1,
    color_fix: str = "none",
    base: Callable[[ISRAdapter], AbstractContextManager[None]] | None = None,
    on_image: Callable[[int, Batch, Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Score every image before and after fine-tuning, from the same noise.

    One image is held at a time. `sr` is scored as floating point, not as an 8-bit file.

    Args:
        adapter: the pipeline with its LoRA on.
        images: batches of one image, as `Data.validation` yields them.
        rewards: by the name they get in the table.
        seed: the noise of image i in draw d is seeded by (seed, d, i).
        draws_per_image: scores are averaged over so many draws of noise; a pipeline without noise takes one.
        color_fix: "none", "adain" or "wavelet".
        base: a context in which the pipeline is the one to compare with; `rewardsr.lora.layers.reference` by default.
        on_image: called with (position, batch, base sr, tuned sr) of the first draw, each sr (1, 3, H, W); for
            pictures and progress bars.

    Raises:
        UserError: no images or rewards, or a reward needs HQ images that are not there.
        TrainingError: a score is not finite; reward, image and side are named.
        ValueError: a batch of several images, fewer than one draw, or a reward that breaks the contract.
    """
    if not rewards:
        raise UserError("nothing to evaluate with: name at least one reward")
    if draws_per_image < 1:
        raise ValueError(f"compare: expected at least one draw an image, got {draws_per_image}")
    base = _reference() if base is None else base
    draws = 1 if adapter.deterministic else draws_per_image
    names: list[str] = []
    sides: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rewards}
    for position, batch in enumerate(images):
        batch = batch.to(adapter.device)
        names.append(_name(batch, position))
        _check(batch, rewards, names[-1])
        for draw in range(draws):
            with base(adapter):
                before = _upscale(adapter, batch, Draws(seed, draw, [position], "evaluate"), color_fix)
            after = _upscale(adapter, batch, Draws(seed, draw, [position], "evaluate"), color_fix)
            for name, reward in rewards.items():
                for scores, sr, side in zip(sides[name], (before, after), ("base", "tuned"), strict=True):
                    score = _score(name, reward, sr, batch, f"{names[-1]} ({side})") / draws
                    if draw == 0:
                        scores.append(score)
                    else:
                        scores[-1] += score
            if draw == 0 and on_image is not None:
                on_image(position, batch, before, after)
    if not names:
        raise UserError("nothing to evaluate: there are no images")
    return Evaluation(
        images=tuple(names),
        rewards={name: _compare(before, after, seed) for name, (before, after) in sides.items()},
        seed=seed,
        draws_per_image=draws,
        color_fix=color_fix,
    )


def _reference() -> Callable[[ISRAdapter], AbstractContextManager[None]]:
    from rewardsr.lora.layers import reference

    return reference


def _name(batch: Batch, position: int) -> str:
    return Path(batch.paths[0]).name if batch.paths else f"image {position}"


def _check(batch: Batch, rewards: Mapping[str, Reward], name: str) -> None:
    if len(batch) != 1:
        raise ValueError(f"compare: expected batches of one image, got {len(batch)}")
    if batch.hq is None:
        needing = [key for key, reward in rewards.items() if reward.needs_hq]
        if needing:
            raise UserError(f"{', '.join(needing)} compare with an HQ image, and {name} has none: leave them out")


def _upscale(adapter: ISRAdapter, batch: Batch, source: Draws, color_fix: str) -> Tensor:
    return upscale_tensor(adapter, batch, generator=source, color_fix=color_fix)


def _score(name: str, reward: Reward, sr: Tensor, batch: Batch, where: str) -> float:
    scores = reward(sr, batch)
    if tuple(scores.shape) != (1,):
        raise ValueError(f"reward '{name}': expected scores of shape (1,), got {tuple(scores.shape)}")
    score = float(scores)
    if not math.isfinite(score):
        raise TrainingError(f"reward '{name}' gave {score} for {where}")
    return score


def _compare(before: list[float], after: list[float], seed: int) -> Comparison:
    low, high = bootstrap((b - a for a, b in zip(before, after, strict=True)), seed)
    return Comparison(tuple(before), tuple(after), low, high)
