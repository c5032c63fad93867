"""Plug-ins as strangers might write them: most are wrong in one way, and a run must say so beforehand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.options import Options

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


class DimmedOptions(Options):
    """Of a degradation."""

    factor: float = 0.5


class Dimmed:
    """A degradation that is right: every k-th pixel, darker."""

    Options = DimmedOptions

    def __init__(self, options: DimmedOptions, scale: int) -> None:
        self._factor, self._scale = options.factor, scale

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return hq[..., :: self._scale, :: self._scale] * self._factor


class Unshrunk(Dimmed):
    """A degradation that forgets the scale."""

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return hq


class Overshooting(Dimmed):
    """A degradation that leaves [0, 1]."""

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return super().__call__(hq, generators) * 4


class Unseeded(Dimmed):
    """A degradation with randomness of its own."""

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        lq = super().__call__(hq, generators)
        return lq * torch.rand(())


class Sharing(Dimmed):
    """A degradation that draws for a whole batch from the generator of its first image."""

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return super().__call__(hq, generators) * torch.rand((len(hq), 1, 1, 1), generator=generators[0])


class LooseOptions(Dimmed):
    """A degradation or reward whose options would swallow what they do not know."""

    Options = dict


def shade(lq: Tensor) -> list[str]:
    """A captioner: how bright the images are, in percent."""
    return [f"{100 * float(image.mean()):.2f} percent bright" for image in lq]


class Shades:
    """The same as a class."""

    def __call__(self, lq: Tensor) -> list[str]:
        return shade(lq)


def speechless(lq: Tensor) -> list[str]:
    """A captioner that gives no texts."""
    return []


def one_text(lq: Tensor) -> str:
    """A captioner that gives a text in place of a list."""
    return "a"


def unread(lq: Tensor) -> list[str]:
    """A captioner that does not work."""
    raise RuntimeError("no weights\nfor the captioner")


class Unmakeable:
    """A captioner or reward that wants something to be made of."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
