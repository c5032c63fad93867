"""Sampling latents that are too large for one network call: overlapping tiles, blended by Gaussian weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardsr.errors import UserError

VARIANCE = 0.01  # of the weights, in squares of the tile's side: SeeSR's and StableSR's


@dataclass(frozen=True)
class Tiling:
    """How latents are cut and blended, as in SeeSR and StableSR.

    Attributes:
        side: of a tile, in latent pixels; only latents of a larger area are cut.
        overlap: of neighbouring tiles, in latent pixels; the last tile of a row or column may overlap by more. Latents
            that are narrower than a tile are cut into squares of their width, which overlap by the same share.
        off_centre: weights as released, whose centre lies half a pixel too low; for comparison.
    """

    side: int
    overlap: int
    off_centre: bool = False

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 <= self.overlap < self.side:
            raise UserError(f"tile is {self.side} with an overlap of {self.overlap}: expected 0 <= overlap < tile")

    def cuts(self, z: Tensor) -> bool:
        """Whether latents (B, C, h, w) are cut: the rule of the originals, by area and not by side."""
        return z.shape[-2] * z.shape[-1] > self.side**2

    def apply(self, predict: Callable[[slice, slice], Tensor], like: Tensor) -> Tensor:
        """Blend the predictions of all tiles.

        Args:
            predict: gives the prediction (B, C, side, side) of the part in these rows and columns.
            like: latents (B, C, h, w) of the whole.

        Returns:
            (B, C, h, w), the weighted mean of the tiles that cover a place.
        """
        height, width = like.shape[-2:]
        side = min(self.side, height, width)
        total, weight = torch.zeros_like(like), torch.zeros_like(like[:1, :1])
        window = self._weights(side).to(like.dtype).to(like.device)  # Apple's devices have no double precision
        for left in self._starts(width, side):
            for top in self._starts(height, side):
                rows, columns = slice(top, top + side), slice(left, left + side)
                total[..., rows, columns] += window * predict(rows, columns)
                weight[..., rows, columns] += window
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
