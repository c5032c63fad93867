"""Sampling latents that are too large for one network call: overlapping tiles, blended by Gaussian weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rewardsr.batch import parts
from rewardsr.errors import UserError
from rewardsr.transfer import to_device

Window = tuple[slice, slice]  # rows and columns of the latents that a tile covers
VARIANCE = 0.01  # of the weights, in squares of the tile's side: SeeSR's and StableSR's


@dataclass(frozen=True)
class Tiling:
    """How latents are cut and blended, as in SeeSR and StableSR.

    Attributes:
        side: of a tile, in latent pixels; only latents of a larger area are cut.
        overlap: of neighbouring tiles, in latent pixels; the last tile of a row or column may overlap by more. Latents
            that are narrower than a tile are cut into squares of their width, which overlap by the same share.
        at_once: how many tiles of an image go through the network in one call, at most.
        off_centre: weights as released, whose centre lies half a pixel too low; for comparison.
    """

    side: int
    overlap: int
    at_once: int = 4
    off_centre: bool = False

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 <= self.overlap < self.side:
            raise UserError(f"tile is {self.side} with an overlap of {self.overlap}: expected 0 <= overlap < tile")

    def cuts(self, z: Tensor) -> bool:
        """Whether latents (B, C, h, w) are cut: the rule of the originals, by area and not by side."""
        return z.shape[-2] * z.shape[-1] > self.side**2

    def apply(self, predict: Callable[[Sequence[Window]], Tensor], like: Tensor) -> Tensor:
        """Blend the predictions of all tiles.

        Args:
            predict: gives the predictions (N*B, C, side, side) of the parts in N windows, one window after another.
            like: latents (B, C, h, w) of the whole.

        Returns:
            (B, C, h, w), the weighted mean of the tiles that cover a place.
        """
        height, width = like.shape[-2:]
        side = min(self.side, height, width)
        total, weight = torch.zeros_like(like), torch.zeros_like(like[:1, :1])
        share = to_device(self._weights(side).to(like.dtype), like.device)  # Apple's devices have no double precision
        places = product(self._starts(width, side), self._starts(height, side))
        windows = [(slice(top, top + side), slice(left, left + side)) for left, top in places]
        for part in parts(len(windows), self.at_once):
            some = windows[part]
            for (rows, columns), prediction in zip(some, predict(some).chunk(len(some)), strict=True):
                total[..., rows, columns] += share * prediction
                weight[..., rows, columns] += share
        return total / weight

    def _starts(self, length: int, side: int) -> list[int]:
        step = side - self.overlap * side // self.side
        return [*range(0, length - side, step), length - side]

    def _weights(self, side: int) -> Tensor:
        """(side, side), in double precision: at the corners they are a billionth of those at the centre."""
        places, middle = torch.arange(side, dtype=torch.float64), (side - 1) / 2
        down, across = (
            torch.exp(-(((places - centre) / side) ** 2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)
            for centre in (side / 2 if self.off_centre else middle, middle)
        )
        return torch.outer(down, across)
