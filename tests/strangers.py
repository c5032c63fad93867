"""Rewards and taggers as strangers might write them: each is wrong in one way, and a run must say so beforehand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardsr.adapter import Batch

NUMBER = 7  # neither a function nor a class


class Rounded:
    """A reward whose gradient is zero everywhere."""

    name, kind, licence = "rounded", "detail", "Apache-2.0"
    needs_hq, differentiable = False, True

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return (sr * 255).round().mean((1, 2, 3))


class Root(Rounded):
    """A reward whose score is finite, and whose gradient is not: the slope of a root at 0."""

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return (sr - sr).square().sum((1, 2, 3)).sqrt()


class Detached(Rounded):
    """A reward that leaves the graph."""

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return sr.detach().mean((1, 2, 3))


class Shifted(Rounded):
    """A reward that gives every image the score of its neighbour."""

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return sr.mean((1, 2, 3)).roll(1)


class InPlace(Rounded):
    """A reward that works without gradients only."""

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return sr.mul_(2).mean((1, 2, 3))


def untagged(image: Tensor) -> tuple[Tensor, Sequence[str]]:
    """A tagger that gives fewer tags than there are images."""
    return torch.zeros(len(image), 10, 512), []


def alone(image: Tensor) -> Tensor:
    """A tagger that gives no tags."""
    return torch.zeros(len(image), 10, 512)


def failing(image: Tensor) -> tuple[Tensor, Sequence[str]]:
    """A tagger that does not work."""
    raise RuntimeError("no weights\nfor the tagger")
