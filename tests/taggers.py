"""A tagger for tests: what RAM gives in shape, made of the image's means by a fixed projection."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Means:
    """Ten tokens of 512 numbers, and the same tags for every image."""

    def __init__(self) -> None:
        self._projection = torch.randn(3, 10 * 512, generator=torch.Generator().manual_seed(0))

    def __call__(self, image: Tensor) -> tuple[Tensor, Sequence[str]]:
        tokens = image.float().mean((2, 3)) @ self._projection.to(image.device)
        return tokens.reshape(len(image), 10, 512), ["bird, tree"] * len(image)


def narrow(image: Tensor) -> tuple[Tensor, Sequence[str]]:
    """Tokens of another width than the networks attend to."""
    return torch.zeros(len(image), 10, 256), [""] * len(image)


class Demanding(Means):
    """A tagger that cannot be made without arguments."""

    def __init__(self, weights: str) -> None:
        super().__init__()
