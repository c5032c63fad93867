"""Scores of one image: what training's validation and `evaluate` have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.draws import seed_of
from rewardsr.errors import TrainingError, UserError
from rewardsr.rewards.base import Reward

Maker = Callable[[Batch, int, int], Tensor]
"""Called with a batch of one image, its position and the number of the draw: `sr` (1, 3, H, W) in [0, 1]."""


class Scorer:
    """Scores what a system makes of one image, averaged over draws of noise.

    Args:
        rewards: by the name they get in the table.
        seed: of what metrics draw at random.
        draws: of noise; at least one.

    Raises:
        UserError: no rewards.
        ValueError: fewer than one draw.
    """

    def __init__(self, rewards: Mapping[str, Reward], seed: int, draws: int) -> None:
        if not rewards:
            raise UserError("nothing to evaluate with: name at least one reward")
        if draws < 1:
            raise ValueError(f"expected at least one draw an image, got {draws}")
        self.rewards, self.seed, self.draws = rewards, seed, draws

    def __call__(self, make: Maker, position: int, batch: Batch, where: str) -> tuple[dict[str, float], Tensor]:
        """Scores of an image, and `sr` (1, 3, H, W) of the first draw.

        Args:
            make: the system.
            position: of the image among all.
            batch: of this image, on the system's device.
            where: image and system, for messages.

        Raises:
            TrainingError: a score is not finite.
            ValueError: a reward breaks the contract.
        """
        scores = dict.fromkeys(self.rewards, 0.0)
        first: Tensor | None = None
        for draw in range(self.draws):
            sr = make(batch, position, draw)
            first = sr if first is None else first
            # A metric that draws at random (MANIQA its crops) sees all systems alike, in any process and step.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, draw, "metrics", position))
                for name, reward in self.rewards.items():
                    scores[name] += _score(name, reward, sr, batch, where) / self.draws
        assert first is not None
        return scores, first


def negated(rewards: Mapping[str, Reward]) -> tuple[str, ...]:
    """The metrics whose scores are the negative of what they are known by: lower is better there."""
    return tuple(name for name, reward in rewards.items() if getattr(reward, "lower_better", False))


def own_margins(rewards: Mapping[str, Reward]) -> dict[str, float]:
    """The margins that metrics bring along for guards, of those that do."""
    own = {name: getattr(reward, "margin", None) for name, reward in rewards.items()}
    return {name: float(margin) for name, margin in own.items() if margin is not None}


def check_hq(rewards: Mapping[str, Reward], name: str, there: bool) -> None:
    """Refuse metrics that need the HQ image which an image has not.

    Raises:
        UserError: there are some; they and the image are named.
    """
    needing = [] if there else [key for key, reward in rewards.items() if reward.needs_hq]
    if needing:
        raise UserError(f"{', '.join(needing)} compare with an HQ image, and {name} has none: leave them out")


def by_metric(images: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Scores of all images, of the scores of each."""
    return {name: tuple(scores[name] for scores in images) for name in images[0]}


def image_name(batch: Batch, position: int) -> str:
    """What an image is called in tables.

    Raises:
        ValueError: a batch of several.
    """
    if len(batch) != 1:
        raise ValueError(f"expected batches of one image, got {len(batch)}")
    return Path(batch.paths[0]).name if batch.paths else f"image {position}"


def _score(name: str, reward: Reward, sr: Tensor, batch: Batch, where: str) -> float:
    scores = reward(sr, batch)
    if tuple(scores.shape) != (1,):
        raise ValueError(f"reward '{name}': expected scores of shape (1,), got {tuple(scores.shape)}")
    score = float(scores)
    if not math.isfinite(score):
        raise TrainingError(f"reward '{name}' gave {score} for {where}")
    return score
